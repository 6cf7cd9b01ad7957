"""``mechdiff doctor``: what is installed, which models and stores are in reach, and what is wrong."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import mechdiff
from mechdiff.commands.options import Options
from mechdiff.errors import ConfigError, UsageError, told

if TYPE_CHECKING:
    from mechdiff.pairs.spec import PairSpec

ABOUT = "Say what is installed, which models and stores are in reach, and what is wrong. Nothing is fetched."
SHOWN = ("torch", "lightning", "transformers", "peft", "h5py", "jsonargparse", "tensorboard", "matplotlib")
TEMPLATE_ROWS = 40
"""Rows of a chat template, at most, where they are kept too."""
GIB = 2**30


def parser() -> Options:
    """Build the parser of the verb."""
    found = Options("mechdiff doctor", description=ABOUT)
    store_help = "folder of a store, <root>/<key>: say which of its rows are sound, and nothing else"
    found.add_argument("store", nargs="*", type=Path, metavar="STORE", help=store_help)
    pair_help = "pair files; by default those in configs/pairs"
    found.add_argument("--pair", nargs="+", action="extend", type=Path, metavar="FILE", help=pair_help)
    config_help = "configuration for which the disk is reckoned; by default that of a run without any"
    found.add_argument("--config", type=Path, metavar="FILE", help=config_help)
    read_help = "folder outside its own that a pair file may name"
    found.add_argument("--may_read", action="append", default=[], metavar="DIR", help=read_help)
    found.add_argument("--stores", type=Path, default=Path("stores"), metavar="DIR", help="default: stores")
    return found


def main(args: Sequence[str]) -> int:
    """Look and tell; 1 if something is wrong, 2 if the configuration cannot be read.

    Args:
        args: Command line after the verb.
    """
    given = parser().parse_args(args)
    pairs = given.pair or sorted(Path("configs/pairs").glob("*.yaml"))
    from mechdiff.commands.soundness import look

    wrong: list[str] = []
    kept = _kept(given.config)
    stores = [("store", look(folder, wrong)) for folder in given.store]
    for title, lines in stores or (
        ("installed", _installed(wrong)),
        ("devices", _devices()),
        ("pairs", _pairs(pairs, given, kept, wrong)),
        ("stores", _stores(given.stores, wrong)),
    ):
        for number, line in enumerate(lines):
            print(f"{'' if number else title:<10} {line}")
    print(f"{'wrong':<10} {wrong[0] if wrong else 'nothing'}")
    for line in wrong[1:]:
        print(f"{'':<10} {line}")
    return int(bool(wrong))


@dataclass(frozen=True)
class Kept:
    """What a run stores of the fit prompts.

    Attributes:
        name: Name of its configuration, empty for a run without any.
        layers: Its layers, as configured.
        sources: Those of base, if they differ.
        positions: Rows that are kept.
        dtype: Type on disk.
        stored: Whether it stores anything.
    """

    name: str = ""
    layers: list[int | str] | str = "fallback"
    sources: list[int | str] | str | None = None
    positions: str = "all"
    dtype: str = "float32"
    stored: bool = True


def _kept(config: Path | None) -> Kept:
    """Read what a configuration stores.

    Raises:
        ConfigError: If it cannot be read, or says what no run would accept.
    """
    if config is None:
        return Kept()
    import yaml
    from jsonargparse import Namespace

    from mechdiff import prepare
    from mechdiff.costs import BYTES

    try:
        body = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, how = body.get("data") or {}, body.get("extraction") or {}
        stored = prepare.needs_states(Namespace(class_path=data["class_path"]))
        about = {key: how[key] for key in ("positions", "dtype") if key in how}
        sources = (data.get("init_args") or {}).get("source_sites")
        found = Kept(config.stem, body.get("layers", "fallback"), sources, **about, stored=stored)
    except (OSError, yaml.YAMLError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{config} is not a configuration of a run: {told(error)} (key: --config)"
        ) from error
    if found.dtype not in BYTES or found.positions not in ("all", "user", "last"):
        raise ConfigError(f"{config} keeps {found.positions} rows as {found.dtype}; see ExtractionSpec")
    return found


def _installed(wrong: list[str]) -> Iterator[str]:
    yield f"mechdiff {mechdiff.__version__}, Python {platform.python_version()} ({sys.executable})"
    found = {name: version for name in SHOWN if (version := _version(name))}
    yield ", ".join(f"{name} {version}" for name, version in found.items())
    for line in metadata.requires("mechdiff") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if "extra ==" not in line and _version(name) is None:
            wrong.append(f"{name} is not installed; run: pip install -e .")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {about.name}, {about.total_memory / GIB:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps"


def _pairs(files: Sequence[Path], given: argparse.Namespace, kept: Kept, wrong: list[str]) -> Iterator[str]:
    """Tell of each pair whether its models are here, and whether its stores will fit.

    A pair that the user did not name may lack its models: the shipped ones need gated weights.
    """
    from mechdiff.study import read_pair

    stores, typed = given.stores, [f"--may_read={folder}" for folder in given.may_read]
    if not files:
        yield "none: no pair file is given, and there is no folder configs/pairs here"
    for file in files:
        try:
            spec = read_pair(file, typed)
        except UsageError as error:
            wrong.append(f"{file}: {error}")
            continue
        except SystemExit:
            wrong.append(f"{file} is not a pair file")
            continue
        lacking = dict(_lacking(spec))
        try:
            found = _needed(spec, kept)
        except UsageError as error:
            wrong.append(f"{spec.name} with {kept.name}: {error}")
            found = None
        need, what = (None, "") if found is None else found
        disk = "" if need is None else f"; its stores need at most {need / GIB:.2f} GiB ({what})"
        said = f"{', '.join(lacking)} not here" if lacking else "all models are here"
        yield f"{spec.name}: {said}{disk}"
        if given.pair:
            wrong += [f"{spec.name}: {reason}" for reason in lacking.values()]
        free = shutil.disk_usage(_existing(stores)).free
        if need is not None and need > free:
            wrong.append(f"{spec.name} needs {need / GIB:.1f} GiB in {stores}, {free / GIB:.1f} GiB are free")


def _lacking(spec: PairSpec) -> Iterator[tuple[str, str]]:
    """Yield what a pair names and is not on this machine, and why."""
    from mechdiff.pairs.sources import in_reach

    for role in ("base", "tuned", "reference"):
        model = getattr(spec, role)
        if model is not None:
            try:
                in_reach(model, f"pair.{role}.id")
            except UsageError as error:
                yield str(model.id), str(error)
    for path in [*spec.prompts, spec.openings]:
        if path and not Path(path).is_file():
            yield Path(path).name, f"no file {path}"


def _needed(spec: PairSpec, kept: Kept) -> tuple[int, str] | None:
    """Return the most bytes that stores of a pair take, with a token per byte of text, and for what.

    Raises:
        UsageError: If the model has no such sites.
    """
    from mechdiff import prepare
    from mechdiff.costs import stored_bytes
    from mechdiff.data.prompts import load_prompts, select

    whose = kept.name or "a run without a configuration"
    if not kept.stored:
        return 0, f"{whose} stores no states"
    try:
        texts = [p.text for p in select(load_prompts(spec.prompts), "fit")]
    except UsageError:
        return None
    base = _shape(spec)
    if base is None:
        return None
    width, depth, heads = base
    stride = kept.layers == prepare.STRIDE
    sites = prepare.settle_sites(prepare.parse_layers(kept.layers), depth, stride=stride)
    sources = prepare.parse_layers(kept.sources) if kept.sources else None
    columns = sum(
        width * (heads if site.component == "head_out" else 1) for site in [*sites, *(sources or sites)]
    )
    longest = [len(text.encode()) + (TEMPLATE_ROWS if kept.positions == "all" else 0) for text in texts]
    rows = len(texts) if kept.positions == "last" else sum(longest)
    need = stored_bytes(rows, columns, kept.dtype)
    which = {"all": "all positions", "user": "positions of the message", "last": "the last position"}
    at = f"{len(sites)} site{'s' * (len(sites) != 1)}"
    what = f"{len(texts)} fit prompts at {at}, {which[kept.positions]}, {kept.dtype}"
    return need, f"{whose}: {what}"


def _shape(spec: PairSpec) -> tuple[int, int, int] | None:
    """Return width, depth and heads of base, None if its configuration is not here yet."""
    from mechdiff.pairs.sources import cache_folder, in_reach, shape

    try:
        place = in_reach(spec.base, "pair.base.id")
    except UsageError:
        return None
    made = cache_folder() / "models"
    files = [place / "config.json"] if place.is_dir() else sorted(made.glob(f"{place.stem}-*/config.json"))
    return shape(files[0], "pair.base.id") if files and files[0].is_file() else None


def _stores(folder: Path, wrong: list[str]) -> Iterator[str]:
    free = shutil.disk_usage(_existing(folder)).free / GIB
    found = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    size = sum(f.stat().st_size for path in found for f in path.rglob("*") if f.is_file()) / GIB
    yield f"{folder}: {len(found)} stores, {size:.2f} GiB; {free:.1f} GiB free"
    for path in found:
        if not (path / "manifest.json").is_file():
            wrong.append(f"{path} has no manifest: an extraction was cut off; it is taken up when run again")
    if not os.access(_existing(folder), os.W_OK):
        wrong.append(f"{_existing(folder)} cannot be written to (key: extraction.root)")


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
