"""Ask the questions of a case, through the modules and callbacks of a user's run, and keep what they say.

What is kept are plain numbers and names, enough to judge every answer later: a changed rule of judging needs
no model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from mechdiff.calibration.cases import GRAFTED
from mechdiff.calibration.states import CaseStates
from mechdiff.callbacks import Grafts, Heads, LayerPatch, MappedPatch, Steering
from mechdiff.callbacks.base import CausalEvaluation
from mechdiff.callbacks.handle_evaluation import two_engines, two_sides
from mechdiff.callbacks.head_cases import find_cases
from mechdiff.callbacks.head_records import LEVEL_P
from mechdiff.callbacks.head_tables import ROLES, begin, means_of
from mechdiff.callbacks.head_tables import measure as fill_tables
from mechdiff.callbacks.states import read_ends
from mechdiff.config import K_SWEEP
from mechdiff.data.nothing import NoStates
from mechdiff.data.prompts import Prompt
from mechdiff.extraction.extractor import placed_on
from mechdiff.functional.churn import head_churn, split_halves
from mechdiff.functional.handles import principal_angles
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.permutation import random_signs
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import graft
from mechdiff.interventions.sites import Site
from mechdiff.modules import CLTMap, Divergence, HeadComparison, SteeringSubspace
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.organisms import Truth
from mechdiff.results import Record, Results

Found = dict[str, Any]
SEPARATELY = 2
"""Eval prompts of the layer patch's controls, which are not judged."""
NEUTRAL = 4
"""Neutral prompts of each split that bound a handle's costs, which are not judged."""
ANSWER_CHARS = 16
"""Longest answer to them."""
RANKED = 12
"""Heads at the top of a ranking that are kept."""
READINGS = 40
"""Draws of labels without a meaning, of one table of heads."""


@torch.no_grad()
def parts(pair: LoadedPair, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[float]:
    """Measure what each planted block does: what can be found of a difference in several places.

    Its weights go into base, and base's into tuned, and each is read beside itself. This is an experiment on
    what was planted, known only here; no method under test takes part.

    Args:
        pair: The models.
        prompts: What is read.
        layers: The planted blocks.

    Returns:
        Nats that the models are moved by, of each block, in the model that it moves more.
    """
    sides = two_sides(pair, prompts, two_engines(pair))
    clean = [read_ends(side, []).log_p for side in sides]
    found = []
    for layer in layers:
        moved = []
        for own, other, before in zip(sides, sides[::-1], clean, strict=True):
            with graft(own.loaded.model, other.loaded.model, f"block.{layer}", None):
                moved.append(float(kl_divergence(before, read_ends(own, []).log_p).mean()))
        found.append(max(moved))
    return found


def ask_layers(pair: LoadedPair, prompts: Sequence[Prompt], states: CaseStates, seed: int) -> Found:
    """Ask at which layer an effect enters, by patch and by graft, and where states differ most."""
    module = Divergence(**states.options(list(states.states[0])), seed=seed)
    asked = [p for p in prompts if p.label == "target"]
    count = sum(p.split == "dev" for p in asked)
    patch = LayerPatch(count, max_prompts=SEPARATELY, everywhere_prompts=0, effect_prompts=0)
    grafts = Grafts(("block",), max_prompts=count, lambdas=(), effect_prompts=0, ranks=False)
    run(module, [patch, grafts], states.whole(), pair, asked, seed)
    patched, grafted = Results(patch.results), Results(grafts.results)
    found: Found = {"patch": {}, "graft": {}}
    for direction in ("into_tuned", "into_base"):
        (entry,) = patched.select(quantity="patch_onset", direction=direction)
        curve = [
            r
            for r in patched.select(quantity="patch_recovery", direction=direction, control="none")
            if r.params["prompts"] == "curve"
        ]
        entered = patched.select(quantity="patch_increment", direction=direction)
        found["patch"][direction] = {
            "onset": None if entry.value is None else int(entry.value),
            "reason": entry.reason,
            "recovery": [_ends(r) for r in curve],
            "increment": [r.value for r in entered],
        }
    for direction in ("base_into_tuned", "tuned_into_base"):
        (gap,) = grafted.select(quantity="graft_kl", direction=direction, component="none")
        curve = grafted.select(quantity="graft_recovery", direction=direction, control="none")
        found["graft"][direction] = {"gap": _ends(gap), "recovery": [_ends(r) for r in curve]}
    proposed = [r for r in module.records() if r.quantity == "chosen_layer"]
    found["divergence"] = [{"layer": int(r.value or 0), "flags": list(r.flags)} for r in proposed]
    return found


def ask_map(pair: LoadedPair, prompts: Sequence[Prompt], states: CaseStates, site: Site, seed: int) -> Found:
    """Ask whether a linear map carries the difference, in held-out states and inside the model."""
    module = CLTMap(**states.options([str(site)]), positions=("last",), seed=seed)
    patch = MappedPatch(all_prompts=0, effect_prompts=0)
    run(module, [patch], states, pair, prompts, seed, fit=True)
    found: Found = {"site": str(site)}
    held, inside = Results(module.records()), Results(patch.results)
    (found["r2_delta"],) = (_answer(r) for r in held.select(quantity="r2_delta", control="none"))
    for quantity in ("kl_reduction", "patch_agreement"):
        (r,) = inside.select(quantity=quantity, control="none", positions="last")
        found[quantity] = _answer(r)
    return found


def ask_rank(
    pair: LoadedPair, prompts: Sequence[Prompt], states: CaseStates, site: Site, truth: Truth, seed: int
) -> Found:
    """Ask how many directions carry the difference, and which."""
    module = SteeringSubspace(**states.options([str(site)]), seed=seed)
    ks = [k for k in K_SWEEP if k <= min(module.k, states.width)]
    steering = Steering(
        ["interchange"],
        ks=ks,
        alphas=[1.0],
        max_neutral=NEUTRAL,
        min_neutral=1,
        answer_chars=ANSWER_CHARS,
        graded_prompts=0,
        generated_prompts=0,
        draws=0,
    )
    run(module, [steering], states, pair, prompts, seed, fit=True)
    found: Found = {"site": str(site), "k": {}, "angles": {}}
    for r in Results(steering.results).select(quantity="minimal_k_90"):
        found["k"][str(r.params.get("solver", module.solver_name))] = _answer(r)
    if truth.directions is not None:
        for solver in module.recipe.solvers:
            basis = module.basis(str(site), solver)[: len(truth.directions)].cpu()
            found["angles"][solver] = principal_angles(truth.directions, basis).tolist()
    return found


def ask_heads(pair: LoadedPair, prompts: Sequence[Prompt], seed: int) -> Found:
    """Ask which heads were rewired: by own change, graft, attribution, and tests of its difference."""
    heads = Heads(
        exchanges=(),
        truth_prompts=0,
        integrated_prompts=0,
        grafted=GRAFTED,
        together_prompts=0,
        edge_prompts=0,
        nulls=2,
    )
    run(HeadComparison(), [heads], NoStates(sites=["resid_post.0"]), pair, prompts, seed)
    results = Results(heads.results)
    changes = results.select(quantity="head_own_change", metric="norm")
    differences = [
        r
        for r in results.select(quantity="head_attribution", model="pair", baseline="twin", control="none")
        if "group" not in r.params and "edge" not in r.params
    ]
    grafts = [r for r in results.select(quantity="graft_recovery") if "head" in r.params]
    tests = [r for r in results.select(quantity="churn_p") if "head" in r.params]
    passed = {
        r.params["floor_from"]: r.value
        for r in results.select(quantity="churn", control="none", rule="bound")
        if r.params["floor_from"] != "curve"
    }
    return {
        "own_change": _ranking(changes),
        "attribution": _ranking(differences),
        "graft": _ranking(grafts),
        "graft_low": max((r.low for r in grafts if r.low is not None), default=None),
        "passed_max": sorted(_head(r) for r in tests if r.value is not None and r.value <= LEVEL_P),
        "passed_bh": next((r.value for r in results.select(quantity="churn_bh")), None),
        "churn": passed,
        "heads": len(changes),
    }


def ask_nothing(pair: LoadedPair, prompts: Sequence[Prompt], kind: str, seed: int) -> Found:
    """Test attributions whose labels mean nothing: swapped by prompt, or two halves of one model's prompts.

    Args:
        pair: The models; for halves, two equal ones.
        prompts: What is read.
        kind: ``swapped`` or ``halves``.
        seed: Of the draws.
    """
    held = [p for p in prompts if p.split == "eval"]
    with torch.inference_mode(False), torch.no_grad():
        cases = find_cases(pair, held, None, None)
        tables = begin(cases, pair)
        fill_tables(cases, tables, means_of(cases), range(len(cases.prompts)), pair)
    base, tuned = (tables.attribution[role, cases.counterfactual] for role in ROLES)
    draws = generator(seed, "readings", kind)
    family, discovery, above, heads = 0, 0, 0, 0
    for reading in range(READINGS):
        if kind == "swapped":
            sign = random_signs(1, len(base), draws)[0][:, None].to(base)
            one, other = torch.zeros_like(base), sign * (tuned - base)
        else:
            one, other = split_halves(base, draws)
        tested = head_churn(one, other, generator=generator(seed, "test", kind, reading))
        family += bool((tested.p_max <= LEVEL_P).any())
        discovery += bool((tested.p_bh <= LEVEL_P).any())
        churned = int((tested.bound > tested.floor).sum())
        above += churned > 0
        heads += churned
    counted = {"passed_max": family, "passed_bh": discovery, "above_floor": above, "heads_above": heads}
    return {"readings": READINGS, **counted, "heads": base.shape[1]}


def run(
    module: DiffModule,
    callbacks: Sequence[CausalEvaluation],
    data: L.LightningDataModule,
    pair: LoadedPair,
    prompts: Sequence[Prompt],
    seed: int,
    fit: bool = False,
) -> None:
    """Fit if asked, test, and let the callbacks evaluate, as a run of the command line does."""
    for callback in callbacks:
        callback.connect(lambda: pair, prompts, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            **placed_on(pair.base.device),
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        if fit:
            trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)


def quiet() -> None:
    """Keep Lightning from announcing every trainer."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _ends(r: Record) -> list[float | None]:
    return [r.value, r.low, r.high]


def _answer(r: Record) -> Found:
    return {"value": r.value, "low": r.low, "high": r.high, "reason": r.reason}


def _head(r: Record) -> list[int]:
    layer, head = str(r.params["head"]).split(".")
    return [int(layer), int(head)]


def _ranking(records: Sequence[Record]) -> list[list[float]]:
    """Return the heads with the largest values by size, the largest first, as ``[layer, head, value]``."""
    known = [r for r in records if r.value is not None]
    best = sorted(known, key=lambda r: -abs(r.value or 0.0))[:RANKED]
    return [[*_head(r), float(r.value or 0.0)] for r in best]
