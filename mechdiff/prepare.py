"""What a run needs before its classes are built: a device, sites, filled stores, a checkpoint that fits."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mechdiff.config import LAYER_STRIDE, fallback_layers
from mechdiff.data.prompts import Prompt, evenly, for_domain, load_prompts, select
from mechdiff.data.store import ActivationStore
from mechdiff.errors import ConfigError, PairError, PromptError, cut
from mechdiff.extraction.extractor import ensure_store, store_identity
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.alignment import encode, template_tokens
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.spec import ModelSpec, PairSpec
from mechdiff.results import Record, Results, handed_on

FAST_FAMILIES = 8
"""Groups of prompts (one language, class and topic) that ``fast_dev_run`` keeps."""
FAST_HELD = 2
"""Prompts of each other split, language and class that it keeps: heads need two of one class."""
FALLBACK, STRIDE, FROM_RQ1 = "fallback", "stride", "from_rq1"
"""Words for layers that need to know the models."""
_LAYER = re.compile(r"-?[0-9]{1,6}")
RESULTS = ".json"
"""How a table of results is told from a site."""


def pair_spec(given: Namespace | None, typed: Sequence[str] = ()) -> PairSpec:
    """Return the pair of a configuration, checked.

    Args:
        given: What was parsed.
        typed: The command line.

    Raises:
        ConfigError: If there is none.
        PairError: If it is not valid, or a pair file names something outside its folder.
    """
    if given is None:
        raise ConfigError("no pair is given; pass --pair configs/pairs/cultural_smol.yaml (key: pair)")
    file = given.pop("__path__", None)  # the configuration is saved with the pair in full
    values = given.as_dict()
    for name, default in asdict(PairSpec()).items():  # the parser lets more pass than their types say
        value = values[name]
        if value is None and default is not None:
            raise PairError(f"{name} is null; leave it out, or give it a value (key: pair.{name})")
        if name in ("base", "tuned", "reference") and value is not None:
            if not isinstance(value, dict):
                raise PairError(f"{name} is {cut(value)}; allowed: id, revision, adapter (key: pair.{name})")
            values[name] = ModelSpec(**value)
    spec = PairSpec(**values).check()
    return spec if file is None else spec.stay_inside(file.absolute, typed)


def device(trainer: Namespace) -> torch.device:
    """Return the device on which a trainer with these options would run this process.

    Raises:
        ConfigError: If there is no such device.
    """
    return trainer_of(trainer).strategy.root_device


def trainer_of(trainer: Namespace) -> Trainer:
    """Make a trainer with the options that say where it runs.

    Raises:
        ConfigError: If there is no such place.
    """
    names = ("accelerator", "devices", "strategy", "num_nodes")
    try:
        return Trainer(barebones=True, **{name: trainer[name] for name in names})
    except (MisconfigurationException, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{reason} (keys: trainer.accelerator, trainer.devices, trainer.strategy)"
        ) from error


def fitting(prompts: Sequence[Prompt], pair: LoadedPair) -> list[Prompt]:
    """Leave out prompts that are longer than the context of a model, and say how many and which.

    Args:
        prompts: All prompts.
        pair: The models.

    Raises:
        PromptError: If none is left.
    """
    models = [m for m in (pair.base, pair.tuned, pair.reference) if m is not None]
    # A token is at least one byte, so that only long texts need to be encoded.
    long = [
        p
        for p in prompts
        if any(2 * len(p.text.encode()) > m.context_length for m in models)
        and any(len(encode(m.tokenizer, p.text)) > m.context_length for m in models)
    ]
    if len(long) == len(prompts):
        raise PromptError(f"all {len(long)} prompts are longer than a model's context (key: pair.prompts)")
    if long:
        left_out = set(long)
        names = ", ".join(p.id for p in long[:5]) + (", ..." if len(long) > 5 else "")
        said = f"{len(long)} of {len(prompts)} prompts are longer than a model's context and are skipped"
        print(f"mechdiff: warning: {said}: {names} (key: pair.prompts)", file=sys.stderr)
        return [p for p in prompts if p not in left_out]
    return list(prompts)


def parse_layers(layers: list[int | str] | str) -> list[Site] | None:
    """Read sites from layer numbers and site names, or those that an earlier run chose.

    Args:
        layers: Layers and sites, a ``results.json``, or a word that needs a depth: None is returned.

    Raises:
        ConfigError: If there is none, or one occurs twice.
        SiteError: If a name is not one of a site.
    """
    if layers in (FALLBACK, STRIDE, FROM_RQ1):
        return None
    if isinstance(layers, str) and layers.endswith(RESULTS):
        return [Site.parse(str(r.site)) for r in chosen_layers(layers)]
    items = [layers] if isinstance(layers, str) else layers
    names = [str(item).strip() for item in items]
    sites = [Site(int(name)) if _LAYER.fullmatch(name) else Site.parse(name) for name in names]
    if not sites or len(set(sites)) != len(sites):
        raise ConfigError(f"layers is {layers}; allowed: at least one layer or site, each once (key: layers)")
    return sites


def chosen_layers(path: str) -> list[Record]:
    """Return the records of the layers that a scan proposes, in order of depth.

    Raises:
        ConfigError: If the file is no table of results, or proposes none.
    """
    found = handed_on(Results.read(path))
    if not found:
        raise ConfigError(f"{path} proposes no layer; give the results.json of an rq1 run (key: layers)")
    return found


def from_rq1(logger: Any, pair: LoadedPair) -> str:
    """Return the newest results of a scan of these very models that proposes layers, else ``fallback``.

    Args:
        logger: Configuration of the logger, whose folder holds the runs.
        pair: The models.
    """
    init = logger.get("init_args") if isinstance(logger, Namespace) else None
    if not init or not init.get("save_dir"):
        return FALLBACK
    weights = {m.role: m.fingerprint for m in (pair.base, pair.tuned)}
    found = Path(init.save_dir).glob(f"rq1*/version_*/results{RESULTS}")
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        results = Results.read(str(path))
        models = results.provenance.get("models", {})
        same = {role: model.get("weights") for role, model in models.items()} == weights
        if same and handed_on(results):
            return str(path.resolve())
    return FALLBACK


def source_of_layers(layers: Any) -> dict[str, Any]:
    """Say where the layers of a run come from, with the warnings of the run that chose them.

    Args:
        layers: The setting, resolved.
    """
    if not str(layers).endswith(RESULTS):
        return {"from": layers if layers in (FALLBACK, STRIDE) else "given", "flags": []}
    flags = {flag for r in Results.read(layers).select(quantity="chosen_layer") for flag in r.flags}
    return {"from": layers, "by": chosen_layers(layers)[0].params["by"], "flags": sorted(flags)}


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


def needs_states(data: Namespace) -> bool:
    """Say whether a configured data class serves states, which have to be extracted."""
    module, _, name = data.class_path.rpartition(".")
    return bool(getattr(getattr(import_module(module), name), "stored", True))


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


def prompts_of(spec: PairSpec, most: int | None, fast: bool) -> list[Prompt]:
    """Read the prompts of a pair.

    Args:
        spec: The pair.
        most: How many of each split, language and class; None takes all.
        fast: Whether a handful is enough.

    Raises:
        ConfigError: If `most` is below 1.
        PromptError: If a file is not as it should be.
    """
    if most is not None and most < 1:
        raise ConfigError(f"max_prompts is {most}; allowed: 1 or more, or null (key: max_prompts)")
    prompts = evenly(for_domain(load_prompts(spec.prompts), spec.domain), most)
    return few(prompts) if fast else prompts


def few(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep a handful of every split, language and class: enough for every split of the fit to have some."""
    kept: list[Prompt] = []
    families: set[tuple[str, ...]] = set()
    for prompt in prompts:
        kind = (prompt.split, prompt.lang, prompt.label)
        family = (*kind, prompt.template if prompt.split == "fit" else prompt.id)
        most = FAST_FAMILIES if prompt.split == "fit" else FAST_HELD
        if family not in families and sum(other[:3] == kind for other in families) < most:
            families.add(family)
            kept.append(prompt)
    return kept
