"""Cases for experiments on heads: a prompt, what stands against it, and the number that is read from it.

1. The number (`metric`) is read after the prompt. `logit_diff`: the logit of the most probable shared token
   less that of the second, by the mean of both models' clean next-token distributions. Neither tokens nor
   sign depend on which model is called tuned, as swaps of these labels need; the gap between the models may
   have either sign, or none. `logprob_correct` and `refusal_logodds` are those of
   `mechdiff.callbacks.graded`, whole texts; `kl_other` is the divergence of the other model's next-token
   distribution from this model's, `refusal` the probability of refusing in percentage points.
2. The counterfactual of a prompt is its neutral twin, else another prompt of the same language (`resample`).
   Of the two, equal tokens in the same order are at the same place; elsewhere nothing is exchanged.
3. Across models, places are aligned as for layer patches. Heads count, and are exchanged, inside the prompt
   only: behind the template's beginning and the first position, up to the prompt's last token. At the tokens
   of an answer or opening that is scored, heads stay as they are, so that what they do there is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mechdiff.callbacks.base import readable
from mechdiff.callbacks.graded import Graded, grades, read_openings, refusing
from mechdiff.callbacks.handle_evaluation import two_engines, two_sides
from mechdiff.callbacks.patcher import Side, groups
from mechdiff.callbacks.states import read_ends
from mechdiff.data.benchmarks.registry import BENCHMARKS, load_benchmarks
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.attribution import Score
from mechdiff.interventions.head_patching import carried
from mechdiff.interventions.head_runs import Baseline, Batch, clean_states
from mechdiff.interventions.hooks import head_weights
from mechdiff.interventions.likelihood import total_logprobs
from mechdiff.modules.base import UNTOUCHED
from mechdiff.pairs.alignment import PREFIX, align, common_template, template_tokens
from mechdiff.pairs.fairness import restrict_logits
from mechdiff.pairs.loading import LoadedPair

METRICS = ("logit_diff", "logprob_correct", "refusal_logodds", "refusal", "kl_other")
_OPENED = ("refusal_logodds", "refusal")
LEAST = 2
"""Prompts without which nothing has an interval."""


@dataclass(frozen=True)
class Case:
    """One prompt as one model reads it.

    Attributes:
        batch: Rows of the prompt with what may follow it, from the first token on.
        score: The number, `(1,)`.
        inner: Where heads count, `(1, T)` boolean.
        start: Length of the template's beginning, the same in all prompts.
        side: The model.
        index: The prompt.
    """

    batch: Batch
    score: Score
    inner: Tensor
    start: int
    side: Side
    index: int

    @property
    def prompt(self) -> Batch:
        """The prompt alone, one row."""
        return Batch(self.side.ids(self.index))

    @cached_property
    def short(self) -> Batch:
        """The rows without the template's beginning, whose keys and values are kept."""
        start, whole = self.start, self.batch
        if not start:
            return whole
        assert whole.logits_at is not None
        prefix = self.side.engine.prefill(whole.tokens[:1, :start])
        mask = None if whole.mask is None else whole.mask[:, start:]
        return Batch(whole.tokens[:, start:], mask, None, whole.logits_at - start, prefix)

    def shortened(self, baseline: Baseline) -> Baseline:
        """Return a baseline in the columns of `short`."""
        z = None if baseline.z is None else {at: _after(part, self.start) for at, part in baseline.z.items()}
        where = None if baseline.where is None else baseline.where[:, self.start :]
        return replace(baseline, z=z, where=where)

    def widened(self, z: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Put z of the prompt's columns into those of the batch."""
        columns = torch.arange(next(iter(z.values())).shape[1]) if z else torch.arange(0)
        return carried(z, columns, columns, self.batch.tokens.shape[1])


@dataclass
class Cases:
    """The prompts of an evaluation as both models read them.

    Attributes:
        prompts: What is asked.
        counterfactual: Name of what stands against them: `twin` or `resample`.
        metric: The number that is read.
        sides: The models with the prompts, by role.
        others: The same with the counterfactuals.
    """

    prompts: list[Prompt]
    counterfactual: str
    metric: str
    sides: dict[str, Side]
    others: dict[str, Side]
    graded: Sequence[Graded | None] = field(default_factory=list)
    log_p: dict[str, Tensor] = field(default_factory=dict)

    def case(self, role: str, index: int) -> Case:
        """Return a prompt as one model reads it."""
        side = self.sides[role]
        ids, regions = side.ids(index), side.encoded[index].regions
        if self.graded:
            graded = self.graded[index]
            assert graded is not None, "a prompt without what is read from it"
            layout = side.lay_out(index, graded)
            tokens = torch.cat([ids[:, :-1].expand(len(layout.tokens), -1), layout.tokens], 1)
            mask = torch.cat([torch.ones_like(tokens[:, : ids.shape[1] - 1]), layout.mask], 1)
            batch = Batch(tokens, mask, None, layout.columns + ids.shape[1] - 1)

            def score(logits: Tensor) -> Tensor:
                value = graded(total_logprobs(logits, layout))
                return (100 * value.sigmoid() if self.metric == "refusal" else value)[None]

            read: Score = score
        else:
            batch = Batch(ids, None, None, torch.tensor([ids.shape[1] - 1], device=ids.device))
            read = self._next_token(role, index)
        start = side.fixed
        inner = torch.zeros(1, batch.tokens.shape[1], dtype=torch.bool)
        inner[0, : len(regions)] = torch.tensor([r != PREFIX for r in regions])
        inner[0, : max(1, start)] = False
        return Case(batch, read, inner, start, side, index)

    def counter(self, case: Case, role: str) -> Baseline:
        """Return what heads add in the counterfactual of a prompt, read by the same model."""
        other = self.others[role]
        theirs = other.encoded[case.index].input_ids
        blocks = SequenceMatcher(
            None, case.side.encoded[case.index].input_ids, theirs, autojunk=False
        ).get_matching_blocks()
        to = torch.cat([torch.arange(b.a, b.a + b.size) for b in blocks])
        source = torch.cat([torch.arange(b.b, b.b + b.size) for b in blocks])
        states = clean_states(other.loaded.model, Batch(other.ids(case.index)))
        length = case.batch.tokens.shape[1]
        return Baseline(carried(states.z, to, source, length), where=case.inner & _marked(to, length))

    def across(self, case: Case, role: str, z: Mapping[int, Tensor]) -> Baseline:
        """Return what heads add in the other model at the same places.

        Args:
            case: The prompt as this model reads it.
            role: Of this model.
            z: The other model's z on the same prompt, `(1, T_other, heads, width)` by layer.
        """
        donor = self.sides["base" if role == "tuned" else "tuned"]
        a, b = case.side.encoded[case.index], donor.encoded[case.index]
        aligned = align(a, b, *self._common(role))
        length = case.batch.tokens.shape[1]
        where = torch.zeros(1, length, dtype=torch.bool)
        where[0, : len(a)] = groups(aligned, a, b) != UNTOUCHED
        weights = {layer: head_weights(donor.loaded.model, layer) for layer in z}
        return Baseline(carried(z, aligned.positions_a, aligned.positions_b, length), weights, where)

    def _common(self, role: str) -> tuple[int, int]:
        roles = (role, "base" if role == "tuned" else "tuned")
        (prefix_a, suffix_a), (prefix_b, suffix_b) = (
            template_tokens(self.sides[name].loaded.tokenizer) for name in roles
        )
        return common_template(prefix_a, prefix_b, suffix_a, suffix_b)

    def _next_token(self, role: str, index: int) -> Score:
        side, log_p = self.sides[role], {name: rows[index].double() for name, rows in self.log_p.items()}
        shared = side.shared
        if self.metric == "kl_other":
            reference = log_p["base" if role == "tuned" else "tuned"].to(side.loaded.device)
            return lambda logits: kl_divergence(reference[None], restrict_logits(logits, shared))
        plus, minus = (int(shared[i]) for i in contrast_tokens(log_p["base"], log_p["tuned"]))
        return lambda logits: (logits[:, plus] - logits[:, minus]).double()


def contrast_tokens(one: Tensor, other: Tensor) -> tuple[int, int]:
    """Return the two tokens that two models find most probable together, the more probable first.

    The models have equal parts in it: a choice by what one of them favours would give every difference of the
    two a sign beforehand, and labels swapped afterwards would not show it.

    Args:
        one: Log-probabilities over the shared tokens, `(size,)`.
        other: The same of the other model.
    """
    plus, minus = (one.exp() + other.exp()).topk(2).indices.tolist()
    return plus, minus


def find_cases(pair: LoadedPair, prompts: Sequence[Prompt], metric: str | None, most: int | None) -> Cases:
    """Choose prompts and a number for a pair.

    Args:
        pair: The models.
        prompts: Prompts of the evaluation.
        metric: One of `METRICS`; None: log P(correct) for a cognitive pair with problems, else the difference
            of logits.
        most: Prompts to use, evenly over languages; None takes all.

    Raises:
        ConfigError: If the metric is unknown.
        PromptError: If fewer than `LEAST` prompts can be used.
    """
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; allowed: {', '.join(METRICS)} (key: metric)")
    problems = list(_problems(pair)) or [p for p in prompts if p.answer is not None]
    if metric is None:
        solve = pair.spec.domain == "cognitive" and bool(problems)
        metric = "logprob_correct" if solve else "logit_diff"
    pool = problems if pair.spec.domain == "cognitive" and problems else list(prompts)
    if metric == "logprob_correct":
        pool = problems
    openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
    if metric in _OPENED:
        pool = [p for p in pool if p.lang in openings]
    kept = readable(pair, pool)[0] if pool else []
    asked, against, name = _paired(kept, most)
    if len(asked) < LEAST:
        raise PromptError(
            f"{len(asked)} prompts can be read for {metric}; allowed: {LEAST} or more "
            "(keys: pair.prompts, pair.benchmarks)"
        )
    engines = two_engines(pair)
    base, tuned = two_sides(pair, asked, engines)
    others = dict(zip(("base", "tuned"), two_sides(pair, against, engines), strict=True))
    cases = Cases(asked, name, metric, {"base": base, "tuned": tuned}, others)
    cases.log_p = {role: read_ends(side, []).log_p for role, side in cases.sides.items()}
    if metric in _OPENED:
        cases.graded = [refusing(openings[p.lang]) for p in asked]
    elif metric == "logprob_correct":
        cases.graded = [next(g for g in grades(p, {}) if g.metric == metric) for p in asked]
    return cases


def _problems(pair: LoadedPair) -> Iterator[Prompt]:
    """Yield the pair's problems whose answer is a number."""
    named = pair.spec.benchmarks.items()
    sources = {
        name: place for name, place in named if name in BENCHMARKS and BENCHMARKS[name].kind == "exact"
    }
    for name, data in load_benchmarks(sources).items():
        for item in data.items:
            where = {"template": f"{name}-{item.id}", "topic": item.id, "answer": str(item.gold)}
            yield Prompt(f"{name}/{item.id}", item.question, item.lang, "target", "eval", **where)


def _paired(prompts: Sequence[Prompt], most: int | None) -> tuple[list[Prompt], list[Prompt], str]:
    """Return prompts, what stands against each, and its name."""
    by_id = {p.id: p for p in prompts}
    targets = [p for p in prompts if p.label == "target"]
    twins = [p for p in targets if p.twin in by_id]
    if twins:
        asked = spread(twins, most)
        return asked, [by_id[str(p.twin)] for p in asked], "twin"
    asked, against = spread(targets, most), []
    for prompt in asked:
        same = [p for p in prompts if p.lang == prompt.lang and p.id != prompt.id]
        pool = [p for p in same if p.label == "neutral"] or [p for p in same if p.answer != prompt.answer]
        if not pool:
            raise PromptError(f"prompt {prompt.id} is alone in language {prompt.lang!r} (key: pair.prompts)")
        after = [p for p in pool if p.id > prompt.id] or pool
        against.append(min(after, key=lambda p: p.id))
    return asked, against, "resample"


def _after(z: Tensor, start: int) -> Tensor:
    return z if z.shape[1] == 1 else z[:, start:]


def _marked(columns: Tensor, length: int) -> Tensor:
    marks = torch.zeros(1, length, dtype=torch.bool)
    marks[0, columns] = True
    return marks
