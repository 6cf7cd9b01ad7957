"""Find what is wrong with a configuration before a model is loaded or anything is written.

1. What a configuration may not decide is refused: to read pickles, to open folders to a pair file, to keep a
   token.
2. The files of the models are found, and the layers checked by their configs.
3. What the run would build is built without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace

from mechdiff import prepare
from mechdiff.data.prompts import Prompt, select
from mechdiff.errors import ConfigError, refuse_secrets
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.sources import model_folder, shape
from mechdiff.pairs.spec import PairSpec, may_read

_WIDEST = 2**20
"""Stands for a width that only the loaded model tells."""


def keep_safe(config: Namespace, typed: Sequence[str]) -> None:
    """Refuse what a configuration may not decide; checkpoints are read without their pickles, in place.

    Args:
        config: What was parsed.
        typed: The command line.

    Raises:
        ConfigError: If a token would be kept with the run, or the configuration opens what only the command
            line may.
    """
    refuse_secrets([*typed, str(config)])
    if config.may_read and not may_read(typed):
        raise ConfigError(f"may_read is {config.may_read}; allowed: on the command line only (key: may_read)")
    config.may_read = None
    seed = config.seed_everything
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed}; allowed: a whole number from 0 to 2**32 - 1")
    if config.weights_only is False:
        raise ConfigError("weights_only is False; allowed: true, nothing pickled is read (key: weights_only)")
    config.weights_only = True


def rehearse(
    config: Namespace,
    spec: PairSpec,
    prompts: Sequence[Prompt],
    asked: list[Site] | None,
    sources: list[Site] | None,
) -> Any:
    """Build what a run builds, without memory and models, and check layers by the configs of the models.

    Args:
        config: The configuration of the verb.
        spec: The pair.
        prompts: Its prompts.
        asked: The sites, None if they need a depth.
        sources: Those of base, None for the same.

    Returns:
        The module, on no device.

    Raises:
        UsageError: If a setting is out of range.
    """
    if prepare.needs_states(config.data):
        select(prompts, "fit")
    named = {"base": spec.base, "tuned": spec.tuned, "reference": spec.reference}
    folders = {role: model_folder(model, f"pair.{role}.id") for role, model in named.items() if model}
    shapes = [shape(folders[role] / "config.json", f"pair.{role}.id") for role in ("base", "tuned")]
    check_layers(asked or [], min((found[1] for found in shapes if found), default=sys.maxsize))
    check_layers(sources or [], shapes[0][1] if shapes[0] else sys.maxsize, "data.source_sites")
    sites = [str(site) for site in asked or sources or [Site(0)]]
    more = {"sites": sites, "source_sites": [str(site) for site in sources] if sources else None}
    try_out(config.data, **{k: v for k, v in more.items() if k in config.data.init_args})
    plain = not any(site.component.startswith("head") for site in [*(asked or ()), *(sources or ())])
    widths = [found[0] if found and plain else _WIDEST for found in shapes]
    return try_out(config.model, **more, d_source=widths[0], d_target=widths[1])


def check_run(verb: str, module: Any, trainer: Namespace) -> None:
    """Refuse to fit what has nothing to fit, and processes that a run has no use for.

    Args:
        verb: ``fit`` or ``test``.
        module: From `rehearse`.
        trainer: Options of the trainer.

    Raises:
        ConfigError: If so.
    """
    if verb == "fit" and not module.needs_fit:
        name = type(module).__name__
        raise ConfigError(f"{name} has nothing to fit; run evaluate.py with it (key: model.class_path)")
    processes = prepare.trainer_of(trainer).world_size
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if processes > 1 and (verb == "test" or not trained):
        what = "a test" if verb == "test" else "a closed form"
        hint = "only extraction and what is trained can use more (key: trainer.devices)"
        raise ConfigError(f"{processes} processes are asked for; {what} runs in 1: {hint}")


def try_out(given: Namespace, **more: Any) -> Any:
    """Build a class without memory: a setting out of range is refused before anything is extracted."""
    module, _, name = given.class_path.rpartition(".")
    with torch.device("meta"):
        return getattr(import_module(module), name)(**{**given.init_args.as_dict(), **more})
