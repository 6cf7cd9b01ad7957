"""MappedPatch: does a mapped state act inside the model as the real state does?

1. Into tuned: base's state replaces tuned's at one site, raw or under the map. KL(P_tuned ‖ P_patched) says
   how much of tuned's next-token distribution is lost; a map that carries base's states to tuned's loses
   little.
2. Into base: tuned's real state, and beside it the map of base's OWN state.
   Agreement = 1 − ΣKL(P_real ‖ P_mapped) / ΣKL(P_real ‖ P_base).
   The effects of the two on the log-odds of refusing openings are correlated within classes of prompts.
   Maps of other sites than residuals (attention, MLP, heads) are not patched.
3. ``last`` patches the final token before the answer, ``all`` every aligned position after the template's
   fixed beginning, which is left alone in every arm: no map is fitted there. A prompt in which nothing is
   aligned is left out and counted.
4. Distributions are renormalised over the tokens that both models have. The model's own state put back
   through the same path (``self``) is the noise floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.graded import Openings, read_openings, refusing
from mechdiff.callbacks.patcher import Patcher, Side, Where
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import PromptError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.alignment import Alignment, align, common_template, encode, template_tokens
from mechdiff.pairs.fairness import FilterReport
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record

WHERE: tuple[Where, ...] = get_args(Where)
Cell = tuple[Where, Site]


class Measured(NamedTuple):
    """What the arms of one site and group of positions do.

    Attributes:
        prompts: The prompts that were patched.
        arms: Nats by prompt, ``(prompts,)``, of each arm.
        noise: Mean of what the arm ``self`` differs from the clean run, nats.
    """

    prompts: list[int]
    arms: dict[str, Tensor]
    noise: float


class MappedPatch(CausalEvaluation):
    """Patches base's states into tuned and back, raw and mapped.

    Args:
        max_prompts: Use at most this many evaluation prompts, evenly over languages and classes; None takes
            all.
        all_prompts: The same for patches of all positions, which cost as many tokens as the prompt has.
        effect_prompts: The same for the refusal log-odds; 0 leaves it out.
        effect_langs: Languages of these prompts; None takes all that have openings. One that a tokenizer
            spells in bytes costs several times as much.
        tokens_per_batch: Tokens run at once when all positions are patched.
    """

    def __init__(
        self,
        max_prompts: int | None = 96,
        all_prompts: int | None = 32,
        effect_prompts: int | None = 24,
        effect_langs: Sequence[str] | None = ("en",),
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        self.max_prompts, self.all_prompts, self.effect_prompts = max_prompts, all_prompts, effect_prompts
        self.effect_langs = None if effect_langs is None else list(effect_langs)
        self.tokens_per_batch = tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Patch every residual site of a map; see the module's docstring."""
        module.to(pair.device)
        path = pair.spec.openings if self.effect_prompts != 0 else None
        openings = read_openings(Path(path)) if path else None
        kept, found = self.kept(pair, prompts, self.max_prompts)
        yield from _readable(prompts, found)
        base = _side(pair.base, pair.shared.base_ids, kept)
        tuned = _side(pair.tuned, pair.shared.tuned_ids, kept)
        for side in (base, tuned):
            side.read(sorted({Site.parse(name) for name in (*module.sites, *module.sources)}))
        yield from self._lost_mass(kept, base, tuned)
        (prefix_b, suffix_b), (prefix_t, suffix_t) = (
            template_tokens(side.loaded.tokenizer) for side in (base, tuned)
        )
        common = common_template(prefix_t, prefix_b, suffix_t, suffix_b)
        into_tuned = [align(t, b, *common) for t, b in zip(tuned.encoded, base.encoded, strict=True)]
        yield from _aligned(kept, tuned, into_tuned)
        patcher = Patcher(module, tuned, base, into_tuned, "into_tuned", self.tokens_per_batch)
        yield from self._into_tuned(kept, patcher)
        if pair.base.width != pair.tuned.width:
            return  # neither the real state nor a mapped one fits into base
        into_base = [align(b, t, *common) for t, b in zip(tuned.encoded, base.encoded, strict=True)]
        patcher = Patcher(module, base, tuned, into_base, "into_base", self.tokens_per_batch)
        measured = self._measure(kept, patcher)
        yield from self._into_base(patcher, measured)
        if openings is not None:
            yield from self._effects(kept, patcher, openings, measured)

    def _lost_mass(self, prompts: Sequence[Prompt], base: Side, tuned: Side) -> Iterator[Record]:
        about = {"question": "rq2", "positions": "last", "split": "eval", "unit": "fraction"}
        for role, side in (("base", base), ("tuned", tuned)):
            for lang in sorted({p.lang for p in prompts}):
                lost = torch.tensor([x for x, p in zip(side.lost, prompts, strict=True) if p.lang == lang])
                yield self.mean(lost, "new_token_mass", **about, model=role, params={"lang": lang})

    def _into_tuned(self, prompts: Sequence[Prompt], patcher: Patcher) -> Iterator[Record]:
        for (positions, site), cell in self._measure(prompts, patcher).items():
            about = _about(patcher, site, positions, cell)
            if not cell.prompts:
                yield missing("kl_mapped", "not_aligned", {**about, "unit": "nats"})
                continue
            raw = cell.arms.get("raw")
            for arm, column in cell.arms.items():
                about["control"] = "none" if arm in ("raw", "mapped") else arm
                yield self.mean(column, "kl_raw" if arm == "raw" else "kl_mapped", **about, unit="nats")
                if raw is not None and arm not in ("raw", "self"):
                    yield self.ratio(column, raw, cell.noise, "kl_reduction", **about, unit="fraction")

    def _into_base(self, patcher: Patcher, measured: Mapping[Cell, Measured]) -> Iterator[Record]:
        for (positions, site), cell in measured.items():
            about = {**_about(patcher, site, positions, cell), "unit": "fraction"}
            if not cell.prompts:
                yield missing("patch_agreement", "not_aligned", about)
                continue
            unpatched = cell.arms["self"]
            for arm, column in cell.arms.items():
                if arm not in ("real", "self"):
                    about["control"] = "none" if arm == "mapped" else arm
                    yield self.ratio(column, unpatched, cell.noise, "patch_agreement", **about)

    def _measure(self, prompts: Sequence[Prompt], patcher: Patcher) -> dict[Cell, Measured]:
        """Return KL(reference ‖ arm) by positions and site.

        The reference is the clean run into tuned, and the arm ``real`` into base.

        Args:
            prompts: What the patcher's sides have read.
            patcher: Runs the arms.
        """
        columns: dict[Cell, dict[int, list[float]]] = defaultdict(dict)
        noise: dict[Cell, list[float]] = defaultdict(list)
        reference = patcher.arms.index("real") if "real" in patcher.arms else None
        patched = {positions: patcher.patched(positions) for positions in WHERE}
        few = set(spread([prompts[index] for index in patched["all"]], self.all_prompts))
        patched["all"] = [index for index in patched["all"] if prompts[index] in few]
        steps = sum(map(len, patched.values())) * len(patcher.sites)
        for positions, index, site, log_p in self.track(_run(patcher, patched), patcher.direction, steps):
            clean = patcher.recipient.log_p[index]
            compared = (clean if reference is None else log_p[reference]).expand_as(log_p)
            values = kl_divergence(compared, log_p).tolist()
            columns[positions, site][index] = values
            noise[positions, site].append(kl_divergence(clean, log_p[patcher.arms.index("self")]).item())
            for arm, value in zip(patcher.arms, values, strict=True):
                about = (str(site), positions, patcher.direction, arm)
                self.items.append(Item(prompts[index].id, "kl", *about, value))
        measured: dict[Cell, Measured] = {}
        for positions in WHERE:
            for site in patcher.sites:
                rows = [columns[positions, site][index] for index in patched[positions]]
                arms = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(patcher.arms)).unbind(1)
                floor = math.fsum(noise[positions, site]) / max(len(rows), 1)
                named = dict(zip(patcher.arms, arms, strict=True))
                measured[positions, site] = Measured(patched[positions], named, floor)
        return measured

    def _effects(
        self,
        prompts: Sequence[Prompt],
        patcher: Patcher,
        openings: Mapping[str, Openings],
        measured: Mapping[Cell, Measured],
    ) -> Iterator[Record]:
        """Correlate the effects of the real and the mapped state on the log-odds of refusing."""
        langs = [lang for lang in openings if self.effect_langs is None or lang in self.effect_langs]
        able = [prompts[i] for i in patcher.patched("last") if prompts[i].lang in langs]
        chosen = spread(able, self.effect_prompts)
        arms = ["real", "mapped", *(["mean_shift"] if "mean_shift" in patcher.arms else [])]
        effects: dict[Site, list[list[float]]] = {site: [] for site in patcher.sites}
        for prompt in self.track(chosen, "refusal log-odds"):
            found = patcher.graded(prompts.index(prompt), refusing(openings[prompt.lang]), arms=arms)
            for site, odds in found:
                changes = [odds[arm] - odds["self"] for arm in arms]
                effects[site].append(changes)
                for arm, change in zip(arms, changes, strict=True):
                    where = (str(site), "last", patcher.direction, arm)
                    self.items.append(Item(prompt.id, "refusal_logodds_change", *where, change))
        classes = [f"{p.lang}/{p.label}" for p in chosen]
        for site, rows in effects.items():
            cell = measured["last", site]
            about = {**_about(patcher, site, "last", cell), "unit": "fraction", "n": len(chosen)}
            if not chosen:
                yield missing(
                    "effect_correlation", "not_aligned" if not cell.prompts else "no_openings", about
                )
            elif not self.gap(cell.arms["self"], cell.noise, about):  # the real state does nothing here
                yield missing("effect_correlation", "gap_too_small", about)
            else:
                real, *others = torch.tensor(rows, dtype=torch.float64).unbind(1)
                for arm, effect in zip(arms[1:], others, strict=True):
                    about["control"] = "none" if arm == "mapped" else arm
                    yield self.correlation(real, effect, classes, "effect_correlation", **about)


def _run(patcher: Patcher, patched: Mapping[Where, list[int]]) -> Iterator[tuple[Where, int, Site, Tensor]]:
    for index in patched["last"]:
        yield from (("last", index, site, log_p) for site, log_p in patcher.last(index))
    yield from (("all", *found) for found in patcher.everywhere(patched["all"]))


def _readable(prompts: Sequence[Prompt], found: FilterReport) -> Iterator[Record]:
    """Yield, for each language, the share of the prompts whose tokens are shared enough to be compared."""
    for lang in sorted({p.lang for p in prompts}):
        shares = [min(found.coverage[p.id]) for p in prompts if p.lang == lang]
        total, left = len(shares), sum(share >= found.min_shared_coverage for share in shares)
        params = {"lang": lang, "of": "prompts", "min_shared_coverage": found.min_shared_coverage}
        yield Record("rq2", "coverage", left / total, total, "fraction", split="eval", params=params)


def _aligned(prompts: Sequence[Prompt], tuned: Side, aligned: Sequence[Alignment]) -> Iterator[Record]:
    """Yield, for each language, the share of tuned's tokens that stand at a place base has too."""
    for lang in sorted({p.lang for p in prompts}):
        these = [i for i, p in enumerate(prompts) if p.lang == lang]
        found = sum(len(aligned[i].positions_a) for i in these)
        tokens = sum(len(tuned.encoded[i]) for i in these)
        params = {"lang": lang, "of": "tokens"}
        about: dict[str, Any] = {"split": "eval", "params": params, "rows": found}
        yield Record("rq2", "coverage", found / tokens, len(these), "fraction", **about)


def _side(loaded: LoadedModel, shared: Tensor, prompts: Sequence[Prompt]) -> Side:
    encoded = [encode(loaded.tokenizer, p.text) for p in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) < 2:
            raise PromptError(f"prompt {prompt.id!r} is 1 token; a patch needs 2 or more (key: pair.prompts)")
    return Side(loaded, SuffixEngine(loaded.model), shared.to(loaded.device), encoded)


def _about(patcher: Patcher, site: Site, positions: Where, cell: Measured) -> dict[str, Any]:
    module = patcher.module
    source = module.sources[module.sites.index(str(site))]
    params = {"direction": patcher.direction, "source_site": source, "solver": module.solver_name}
    return {
        "question": "rq2",
        "site": str(site),
        "positions": positions,
        "split": "eval",
        "n": len(cell.prompts),
        "params": params,
        "flags": ("unaligned_prompts",) if len(patcher.patched(positions)) < len(patcher.where) else (),
    }
