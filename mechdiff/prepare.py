"""What a run needs before its classes are built: a device, sites, filled stores, a checkpoint that fits."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mechdiff.config import LAYER_STRIDE, fallback_layers
from mechdiff.data.prompts import Prompt, select
from mechdiff.data.store import ActivationStore
from mechdiff.errors import CheckpointError, ConfigError
from mechdiff.extraction.extractor import ExtractionSpec, ensure_store, store_identity
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.alignment import template_tokens
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.spec import ModelSpec, PairSpec
from mechdiff.results import Record, Results

FAST_FAMILIES = 8
"""Groups of prompts (one language, class and topic) that ``fast_dev_run`` keeps."""
FILLED_IN = ("sites", "source_sites", "d_source", "d_target", "noise")
"""Settings of a module that come from the run, not from its configuration."""
RESULTS = ".json"
"""How a table of results is told from a site."""
STORES = "stores"
"""Where a checkpoint keeps the keys of the stores that it was fitted to."""


def pair_spec(given: Namespace | None) -> PairSpec:
    """Return the pair of a configuration, checked.

    Raises:
        ConfigError: If there is none.
        PairError: If it is not valid.
    """
    if given is None:
        raise ConfigError("no pair is given; pass --pair configs/pairs/cultural_smol.yaml (key: pair)")
    given.pop("__path__", None)  # the configuration is saved with the pair in full
    values = given.as_dict()
    values |= {role: ModelSpec(**values[role]) for role in ("base", "tuned", "reference") if values.get(role)}
    return PairSpec(**values).check()


def device(trainer: Namespace) -> torch.device:
    """Return the device on which a trainer with these options would run this process.

    Raises:
        ConfigError: If there is no such device.
    """
    names = ("accelerator", "devices", "strategy", "num_nodes")
    try:
        return Trainer(barebones=True, **{name: trainer[name] for name in names}).strategy.root_device
    except (MisconfigurationException, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{reason} (keys: trainer.accelerator, trainer.devices, trainer.strategy)"
        ) from error


def parse_layers(layers: list[int | str] | str) -> list[Site] | None:
    """Read sites from layer numbers and site names, or those that an earlier run chose.

    Args:
        layers: Layers and sites, a ``results.json``, or a word that needs a depth: None is returned.

    Raises:
        ConfigError: If there is none, or one occurs twice.
        SiteError: If a name is not one of a site.
    """
    if layers in ("fallback", "stride"):
        return None
    if isinstance(layers, str) and layers.endswith(RESULTS):
        return [Site.parse(str(r.site)) for r in chosen_layers(layers)]
    items = [layers] if isinstance(layers, str) else layers
    names = [str(item).strip() for item in items]
    sites = [Site(int(name)) if name.removeprefix("-").isdigit() else Site.parse(name) for name in names]
    if not sites or len(set(sites)) != len(sites):
        raise ConfigError(f"layers is {layers}; allowed: at least one layer or site, each once (key: layers)")
    return sites


def chosen_layers(path: str) -> list[Record]:
    """Return the records of the layers that a run proposed by divergence, in order of depth.

    Raises:
        ConfigError: If the file is no table of results, or proposes none.
    """
    found = Results.read(path).select(quantity="chosen_layer", by="cka_debiased")
    if not found:
        raise ConfigError(f"{path} proposes no layer; give the results.json of an rq1 run (key: layers)")
    return sorted(found, key=lambda r: r.value or 0)


def doubts(path: str) -> list[str]:
    """Return the warnings that a run gave with the layers that it chose."""
    chosen = Results.read(path).select(quantity="chosen_layer")
    return sorted({flag for r in chosen for flag in r.flags})


def settle_sites(sites: list[Site] | None, *depths: int, stride: bool = False) -> list[Site]:
    """Return the sites, checked against the depths of the models.

    Args:
        sites: The sites, None for the scaled default layers.
        depths: Number of blocks of each model.
        stride: Take every `LAYER_STRIDE`-th layer instead of the default ones.
    """
    depth = min(depths)
    layers = list(range(0, depth, LAYER_STRIDE)) if stride else fallback_layers(depth)
    chosen = [Site(layer) for layer in layers] if sites is None else sites
    check_layers(chosen, depth)
    return chosen


def needs_fit(model: Namespace) -> bool:
    """Say whether a configured module has nothing to test before a fit."""
    module, _, name = model.class_path.rpartition(".")
    return bool(getattr(import_module(module), name).needs_fit)


def fill_stores(
    pair: LoadedPair,
    prompts: Sequence[Prompt],
    sites: Mapping[str, Sequence[Site]],
    spec: ExtractionSpec,
    given: Mapping[str, str],
    trainer_kwargs: dict[str, Any] | None = None,
) -> dict[str, ActivationStore]:
    """Return the stores of base (``source``) and tuned (``target``), after extracting what they lack.

    Args:
        pair: The models.
        prompts: All prompts; those of split ``fit`` are stored.
        sites: Sites by role.
        spec: Where and how.
        given: Folders by role that the user insists on; they are opened, never written.
        trainer_kwargs: Options of the trainer that extracts; one device by default.

    Raises:
        StoreError: If a given store was made from something else or lacks a site.
    """
    texts = select(prompts, "fit")
    stores = {}
    for role, model in (("source", pair.base), ("target", pair.tuned)):
        if given.get(role):
            tokens = template_tokens(model.tokenizer)
            identity = store_identity(model, texts, spec.check(), *tokens)
            stores[role] = ActivationStore.open(given[role], identity)
            for site in sites[role]:
                stores[role].width(site)
        else:
            stores[role] = ensure_store(model, texts, sites[role], spec, trainer_kwargs=trainer_kwargs)
    return stores


def try_out(given: Namespace, **more: Any) -> None:
    """Build a class without memory: a setting out of range is refused before anything is extracted."""
    module, _, name = given.class_path.rpartition(".")
    with torch.device("meta"):
        getattr(import_module(module), name)(**{**given.init_args.as_dict(), **more})


def width(model: LoadedModel, site: Site) -> int:
    """Return the width of the rows that a store keeps of a site."""
    if site.component == "head_z":
        return model.num_heads * model.head_dim
    return model.width * (model.num_heads if site.component == "head_out" else 1)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Return what a checkpoint says of itself: class, settings and the stores that it was fitted to.

    Raises:
        CheckpointError: If it is missing or not a checkpoint of this library.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not a file; give a checkpoint written by a fit (key: ckpt_path)")
    try:
        body = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        settings = dict(body["hyper_parameters"])
        settings.pop("_instantiator", None)
        return {
            "class_path": settings.pop("_class_path"),
            "settings": settings,
            "stores": body.get("callbacks", {}).get(STORES),
        }
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(f"{path} is not a checkpoint written by a fit (key: ckpt_path)") from error


def check_class(path: str, stored: Mapping[str, Any], model: Namespace) -> None:
    """Refuse a checkpoint of another class.

    Raises:
        CheckpointError: If it is.
    """
    wrote, wanted = (name.rpartition(".")[2] for name in (stored["class_path"], model.class_path))
    if wrote != wanted:
        raise CheckpointError(
            f"{path} was written by {wrote}; allowed: a checkpoint of {wanted} (key: ckpt_path)"
        )


def overridden(stored: Mapping[str, Any], model: Namespace, defaults: Mapping[str, Any]) -> Iterable[str]:
    """Yield the settings that were changed from their defaults and that a checkpoint changes back."""
    for name, value in model.init_args.as_dict().items():
        kept = stored["settings"].get(name, value)
        if name not in FILLED_IN and _plain(value) not in (_plain(kept), _plain(defaults.get(name))):
            yield f"model.{name} is {value}, but {kept} in the checkpoint, which counts"


def check_sites(path: str, stored: Mapping[str, Any], sites: Sequence[Site], sources: Sequence[Site]) -> None:
    """Refuse a checkpoint of other sites.

    Raises:
        CheckpointError: If it is.
    """
    for key, wanted in (("sites", sites), ("source_sites", sources)):
        kept = list(stored["settings"].get(key) or stored["settings"]["sites"])
        if kept != list(map(str, wanted)):
            names = ", ".join(map(str, wanted))
            raise CheckpointError(
                f"{path} holds {key} {', '.join(kept)}; allowed: {names} (keys: layers, ckpt_path)"
            )


def check_stores(path: str, stored: Mapping[str, Any], stores: Mapping[str, ActivationStore]) -> None:
    """Refuse a checkpoint that was fitted to other activations.

    Raises:
        CheckpointError: If it is.
    """
    kept = stored["stores"] or {}
    for role, store in stores.items():
        if kept.get(role) not in (None, store.identity.key):
            raise CheckpointError(
                f"{path} was fitted to store {kept[role]}, not {store.identity.key}: another pair, texts "
                "or another extraction (keys: pair, extraction, ckpt_path)"
            )


def check_split(path: str, stored: Mapping[str, Any], split: str | None) -> None:
    """Refuse a checkpoint whose training prompts may now be test prompts.

    Raises:
        CheckpointError: If it is.
    """
    kept = (stored["stores"] or {}).get("split")
    if kept not in (None, split):
        raise CheckpointError(
            f"{path} was fitted to another split of the prompts; allowed: the seed, topics, templates and "
            "data.val_frac of that fit (keys: seed_everything, data, ckpt_path)"
        )


def newest_checkpoint(logger: Any) -> str | None:
    """Return the newest checkpoint of the runs of a logger's configuration."""
    init = logger.get("init_args") if isinstance(logger, Namespace) else None
    if not init or not init.get("save_dir"):
        return None
    folder = Path(init.save_dir) / str(init.get("name") or "lightning_logs")
    found = sorted(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def make_absolute(config: Namespace) -> None:
    """Make the paths of a configuration absolute, in place, so that it can be run again from elsewhere."""
    for key in (
        "extraction.root",
        "trainer.default_root_dir",
        "trainer.logger.init_args.save_dir",
        "ckpt_path",
        "layers",
    ):
        value = config.get(key)
        if key == "layers" and not str(value).endswith(RESULTS):
            continue
        if value and (key != "ckpt_path" or value != "last"):
            config[key] = os.path.abspath(os.path.expanduser(value))


def few(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep a handful of every split, language and class: enough for every split of the fit to have some."""
    kept: list[Prompt] = []
    families: set[tuple[str, ...]] = set()
    for prompt in prompts:
        kind = (prompt.split, prompt.lang, prompt.label)
        family = (*kind, prompt.template if prompt.split == "fit" else prompt.id)
        most = FAST_FAMILIES if prompt.split == "fit" else 1
        if family not in families and sum(other[:3] == kind for other in families) < most:
            families.add(family)
            kept.append(prompt)
    return kept


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
