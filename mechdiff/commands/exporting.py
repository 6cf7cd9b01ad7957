"""What `mechdiff export` does: settle the handle, load its fit and its model, write.

The command line is in `mechdiff.commands.export`, which loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechdiff import checkpoints, modules
from mechdiff.callbacks.handle_evaluation import CHOSEN
from mechdiff.errors import CheckpointError, ConfigError, FitError, HandleError, PairError, told
from mechdiff.handles.control_vector import write_control_vector
from mechdiff.handles.files import NEEDS, ROLES, Handle, Manifest, check_kind, write
from mechdiff.handles.identity import weights_hash
from mechdiff.modules.subspaces import Subspaces
from mechdiff.pairs.loading import LoadedModel, load_model
from mechdiff.pairs.spec import ModelSpec
from mechdiff.results import Record, Results

SUFFIXES = (".safetensors", ".gguf")


def write_out(
    run: str, asked: Mapping[str, Any], positions: str, results: str | None, out: str | None
) -> list[str]:
    """Write a handle; arguments are those of `mechdiff.commands.export.export`, ``asked`` those of `choose`.

    Raises:
        UsageError: If there is no such handle, or it cannot leave its pair.
    """
    if out is not None and Path(out).suffix not in SUFFIXES:
        raise ConfigError(f"out is {out}; allowed: a file that ends in {' or '.join(SUFFIXES)} (key: out)")
    folder, checkpoint = _find(run, results)
    table = Results.read(results or folder / "results.json")
    _check_origin(table, str(results or folder / "results.json"))
    cell = choose(table, asked)
    module = _fit(checkpoint, table)
    handle, model = build(module, table, cell, positions)
    m = handle.manifest
    path = Path(out or folder / "handles" / f"{m.kind}-k{m.k}-{m.site}.safetensors")
    what = f"{m.kind}, k {m.k}, alpha {m.alpha:g}, {m.solver}, at {m.site} of {m.model} ({cell['chosen']})"
    also = [f"also chosen: {cell['others']}; name one with --edit and --site"] if cell["others"] else []
    if path.suffix == ".safetensors":
        return [f"{write(path, handle)}: {what}", *also]
    write_control_vector(path, handle, model.model.config.model_type)
    return [
        f"{path}: {what}",
        *also,
        "llama.cpp adds it at every token, the prompt's too; what the run measured edits the prompt's last "
        "token and the answer.",
    ]


def choose(table: Results, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settle which handle is meant: what is asked for, and for the rest what the run chose.

    Args:
        table: Records of the run.
        asked: ``edit``, ``k``, ``alpha``, ``site`` and ``solver``; None where nothing is asked.

    Returns:
        The same, all of them settled but perhaps ``solver``; ``chosen``, by whom; and ``others`` that the run
        chose too.

    Raises:
        HandleError: If the edit cannot leave its pair, or nothing settles a value.
    """
    if asked["edit"] is not None:
        check_kind(asked["edit"])
    records = table.select(quantity=CHOSEN, control="none")
    fits = [r for r in records if r.value is not None and r.site and _agrees(r, asked)]
    usable = [r for r in fits if r.params.get("edit") in NEEDS]
    if fits and not usable and asked["edit"] is None:
        check_kind(str(fits[0].params.get("edit")))
    cell, by = dict(asked), "as asked"
    if usable:
        found = usable[0]
        own = {**found.params, "k": int(found.value or 0), "site": found.site}
        cell = {name: own.get(name) if value is None else value for name, value in asked.items()}
        by = "as the run chose" if cell == {name: own.get(name) for name in asked} else "the run's, altered"
    if cell["edit"] == "add" and cell["k"] is None:
        cell["k"] = 1
    if lacking := [name for name in ("edit", "k", "alpha", "site") if cell[name] is None]:
        why = next((f" ({r.reason})" for r in records if r.reason), "")
        raise HandleError(f"the run chose no such handle{why}; give --{' --'.join(lacking)} (key: edit)")
    others = ", ".join(f"{r.params['edit']} at {r.site}" for r in usable[1:])
    return {**cell, "chosen": by, "others": others}


def build(
    module: Subspaces, table: Results, cell: Mapping[str, Any], positions: str
) -> tuple[Handle, LoadedModel]:
    """Make a handle of a fit, and load the model that it is for.

    Args:
        module: The fit.
        table: Records of its run, for their provenance.
        cell: From `choose`.
        positions: Which tokens it edits.

    Raises:
        UsageError: If the fit has no such handle, or the model is not that of the run.
    """
    kind, site, role = cell["edit"], cell["site"], ROLES[cell["edit"]]
    source = module.sources[module.index(site)]
    if source != site:
        raise FitError(f"the handle leads from {source} to {site}; allowed: one site (key: source_sites)")
    if kind == "add" and cell["k"] != 1:
        raise FitError(f"k is {cell['k']} with edit add; allowed: 1, a shift has one direction (key: k)")
    solver = cell["solver"] or module.solver_name
    known = module.known(site, module.basis(site, solver, cell["k"]))
    model = _model(table, role)
    origin = table.provenance
    manifest = Manifest(
        site=site,
        kind=kind,
        k=cell["k"],
        alpha=float(cell["alpha"]),
        width=module.delta.shape[-1],
        model=role,
        weights=weights_hash(model.model),
        fingerprint=model.fingerprint,
        positions=positions,
        solver=solver,
        provenance={
            "pair": origin["pair"]["name"],
            "base": origin["pair"]["base"]["id"],
            "tuned": origin["pair"]["tuned"]["id"],
            "adapter": origin["pair"]["tuned"].get("adapter"),
            "contrast": module.contrast,
            "seed": origin["seed"],
            "dtype": origin["dtype"],
            "mechdiff": origin["mechdiff"],
            "commit": origin["commit"],
            "chosen": cell["chosen"],
        },
    )
    return Handle(manifest, known), model


def _check_origin(table: Results, path: str) -> None:
    """Refuse a table that does not say of which models it is.

    Raises:
        ConfigError: If so.
    """
    origin = table.provenance
    try:
        for role in ("base", "tuned"):
            ModelSpec(**origin["pair"][role])
            origin["models"][role]["weights"]
        _ = [origin["pair"]["name"], *(origin[key] for key in ("seed", "dtype", "mechdiff", "commit"))]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say of which models it is: {told(error)} (key: results)"
        ) from error


def _agrees(record: Record, asked: Mapping[str, Any]) -> bool:
    own = {"edit": record.params.get("edit"), "site": record.site, "solver": record.params.get("solver")}
    return all(asked[name] in (None, value) for name, value in own.items())


def _find(run: str, results: str | None) -> tuple[Path, Path]:
    """Return the folder of a run and its checkpoint.

    Raises:
        CheckpointError: If there is none, or more than one.
    """
    path = Path(run)
    if path.is_file():
        homes = [home for home in (path.parent, path.parent.parent) if (home / "results.json").is_file()]
        if not homes and results is None:
            raise CheckpointError(f"no results.json beside {path}; name that of its test (key: results)")
        return (homes or [path.parent])[0], path
    found = sorted((path / "checkpoints").glob("*.ckpt"))
    if len(found) == 1:
        return path, found[0]
    has = f"holds {len(found)} checkpoints" if path.is_dir() else "is neither a run's folder nor a file"
    names = f" of {', '.join(p.name for p in found)}" if found else ", such as <run>/checkpoints/fitted.ckpt"
    raise CheckpointError(f"{path} {has}; give one{names} (key: run)")


def _fit(path: Path, table: Results) -> Subspaces:
    """Load a fit.

    Raises:
        CheckpointError: If it is no subspace, or not that of the results.
    """
    stored = checkpoints.read(str(path))
    name = stored["class_path"].rpartition(".")[2]
    kind = getattr(modules, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Subspaces)):
        raise CheckpointError(f"{path} was written by {name}; allowed: SteeringSubspace (key: run)")
    kept, stated = stored["stores"] or {}, table.provenance.get("stores", {})
    if any(kept.get(role) not in (None, key) for role, key in stated.items()):
        raise CheckpointError(
            f"{path} was fitted to other activations than the results are of (key: results)"
        )
    try:
        module = kind(**stored["settings"])
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no whole {name}: {told(error)} (key: run)") from error
    if not module.fitted:
        raise CheckpointError(f"{path} holds a subspace that has not been fitted (key: run)")
    return module


def _model(table: Results, role: str) -> LoadedModel:
    """Load the model that a handle is for.

    Raises:
        PairError: If its files are no longer those of the run.
    """
    pair = table.provenance["pair"]
    model = load_model(ModelSpec(**pair[role]), role=role, dtype=getattr(torch, pair["dtype"]))
    if model.fingerprint != table.provenance["models"][role]["weights"]:
        raise PairError(
            f"the files of {role} have changed since the run; restore them or fit again (key: pair.{role}.id)"
        )
    return model
