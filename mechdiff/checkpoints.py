"""What a checkpoint says of itself, and whether it fits the run that is to load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from inspect import signature
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mechdiff.data.store import ActivationStore
from mechdiff.errors import CheckpointError, cut
from mechdiff.files import whole
from mechdiff.interventions.sites import Site

FILLED_IN = ("sites", "source_sites", "d_source", "d_target", "noise")
"""Settings of a module that come from the run, not from its configuration."""
STORES = "stores"
"""Where a checkpoint keeps the keys of the stores that it was fitted to."""


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, wherever they are.

    Lightning writes into the folder for temporary files and moves: to another disk, a move is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint."""
        assert storage_options is None, "there are none for a file"
        body = BytesIO()
        torch.save(checkpoint, body)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(path)) as part:
            part.write_bytes(body.getbuffer())


def read(path: str) -> dict[str, Any]:
    """Return what a checkpoint says of itself: class, settings and the stores that it was fitted to.

    Only weights are read: a pickled object of any other kind is refused, and nothing of it runs.

    Raises:
        CheckpointError: If it is missing or not a checkpoint of this library.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not a file; give a checkpoint written by a fit (key: ckpt_path)")
    try:
        body = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        settings = dict(body["hyper_parameters"])
        settings.pop("_instantiator", None)
        stores = body.get("callbacks", {}).get(STORES)
        return {
            "class_path": "" + settings.pop("_class_path"),
            "settings": settings,
            "stores": None if stores is None else {str(role): str(key) for role, key in stores.items()},
        }
    except Exception as error:  # the reader of weights names no class for what is not one of its files
        raise CheckpointError(f"{path} is not a checkpoint written by a fit (key: ckpt_path)") from error


@contextmanager
def parsed(path: str | None) -> Iterator[None]:
    """Tell in one line that the settings of a checkpoint cannot be parsed.

    Raises:
        CheckpointError: If so.
    """
    try:
        with redirect_stderr(StringIO()):
            yield
    except SystemExit as left:
        said = f"{path} has settings that its class does not take (key: ckpt_path)"
        raise CheckpointError(said) from left


def check_class(path: str, stored: Mapping[str, Any], model: Namespace) -> None:
    """Refuse a checkpoint of another class, or of one of another package: it would be imported.

    Raises:
        CheckpointError: If it is, or has settings that the class does not take.
    """
    names = (stored["class_path"], model.class_path)
    (home, wrote), (own, wanted) = ((n.partition(".")[0], n.rpartition(".")[2]) for n in names)
    if (home, wrote) != (own, wanted):
        other = wrote if wrote != wanted else stored["class_path"]
        raise CheckpointError(
            f"{path} was written by {cut(other)[1:-1]}; allowed: a checkpoint of {wanted} (key: ckpt_path)"
        )
    module = import_module(model.class_path.rpartition(".")[0])
    if unknown := set(stored["settings"]) - set(signature(getattr(module, wanted)).parameters):
        found = cut(sorted(map(str, unknown)))
        raise CheckpointError(f"{path} has settings {found}; {wanted} takes none such (key: ckpt_path)")


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
        kept = list(map(str, stored["settings"].get(key) or stored["settings"].get("sites") or ()))
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


def newest(logger: Any, name: str = "*.ckpt") -> str | None:
    """Return the newest checkpoint of the runs of a logger's configuration, None if there is none.

    Args:
        logger: Its configuration.
        name: Which files count; `last.ckpt`, written after every epoch, holds all that a fit goes on from.
    """
    init = logger.get("init_args") if isinstance(logger, Namespace) else None
    if not init or not init.get("save_dir"):
        return None
    folder = Path(init.save_dir) / str(init.get("name") or "lightning_logs")
    found = sorted(folder.glob(f"version_*/checkpoints/{name}"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
