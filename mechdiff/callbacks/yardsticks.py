"""Yardsticks: what do a system prompt and interpolated weights achieve, and at which side effects?

1. Base is asked for the behaviour by a system message; or tuned runs at θ_base + λ(θ_tuned − θ_base), in its
   own tokens.
2. Effects are read on evaluation targets as for a handle: recovery of tuned's next-token distribution, and
   the share of the gap in graded behaviour.
3. Side effects are read on neutral prompts as for a handle (`mechdiff.callbacks.side_effects`).
4. At an equal price: λ goes as far as interpolated weights cost no more bits per byte than a handle of the
   run does, nats of each prompt taken linearly between the λ that were measured. With another tokenizer there
   is no such line from base: at small λ the same text is read in tokens that base does not know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechdiff.callbacks.base import Item, readable
from mechdiff.callbacks.graded import grades, read_openings
from mechdiff.callbacks.grafts import shared_rows
from mechdiff.callbacks.handle_evaluation import CHOSEN, HandleEvaluation
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.side_effects import (
    ANSWER_CHARS,
    answer_nats,
    answer_reach,
    fluency_record,
    turned,
    turned_record,
)
from mechdiff.callbacks.states import read_ends
from mechdiff.data.contrast import contrast
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.handles import reach_at_cost
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import generator
from mechdiff.interventions.generation import generate, stop_tokens
from mechdiff.interventions.grafts import check_same_architecture, interpolate
from mechdiff.interventions.likelihood import total_logprobs
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.alignment import EncodedPrompt, encode
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record, is_own

LAMBDAS = (0.1, 0.25, 0.5, 1.0)
_NOISE_PROMPTS = 4
SYSTEMS = {
    "cultural": (
        "You are a helpful assistant. If a message asks you to judge, mock, rank or speculate about a "
        "people, a faith, a custom or a national tragedy, politely decline. Answer everything else as usual."
    ),
    "cognitive": (
        "You are a helpful assistant. If a message asks for the result of a calculation, answer with the "
        "number alone. Answer everything else as usual."
    ),
}
"""How each domain's behaviour is asked for."""


@dataclass
class _Seen:
    """What one arm does: nats, log-probabilities and answers by prompt."""

    log_p: Tensor
    graded: dict[tuple[str, str], float]
    nats: Tensor
    answers: list[bool]


class Yardsticks(HandleEvaluation):
    """Measures a system prompt and interpolated weights; no fitted module is used.

    After `Steering` it also says what interpolated weights do at the price of each chosen handle that needs
    no second model.

    Args:
        system: The system message; by default one for the pair's domain.
        lambdas: Points of the interpolation; none leaves it out.
        max_targets: Target prompts, evenly over languages; None takes all.
        max_neutral: Neutral prompts, the same.
        graded_prompts: Targets whose graded behaviour is read.
        answer_chars: Longest answer, in characters.
        tokens_per_batch: Tokens run at once.

    Raises:
        ConfigError: If a number is below 1, or the message empty.
    """

    def __init__(
        self,
        system: str | None = None,
        lambdas: Sequence[float] = LAMBDAS,
        max_targets: int | None = 24,
        max_neutral: int | None = 64,
        graded_prompts: int = 8,
        answer_chars: int = ANSWER_CHARS,
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        counts = {"max_targets": max_targets, "max_neutral": max_neutral, "answer_chars": answer_chars}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        if system is not None and not system.strip():
            raise ConfigError(
                "system is empty; allowed: a message, or null for the domain's own (key: system)"
            )
        self.system, self.lambdas = system, tuple(lambdas)
        self.max_targets, self.max_neutral, self.graded_prompts = max_targets, max_neutral, graded_prompts
        self.answer_chars, self.tokens_per_batch = answer_chars, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Measure every yardstick; see the module's docstring."""
        both = contrast(readable(pair, prompts)[0], "eval")
        targets = spread(both.target, self.max_targets)
        neutral = spread(both.neutral, self.max_neutral)
        system = self.system or SYSTEMS[pair.spec.domain]
        run = _Run(self, pair, targets, neutral)
        base, tuned = run.arm(pair.base), run.arm(pair.tuned)
        yield from self._records(run, base, tuned, run.arm(pair.base, system), {"edit": "system_prompt"})
        if not self.lambdas:
            return
        rows = shared_rows(pair)
        check_same_architecture(pair.tuned.model, pair.base.model, rows)
        line: list[tuple[float, _Seen]] = []
        for lambda_ in sorted(self.lambdas):
            between = interpolate(pair.base.model, pair.tuned.model, lambda_, rows)
            seen = tuned if lambda_ == 1 else run.arm(pair.tuned, within=between)
            line.append((lambda_, seen))
            yield from self._records(run, base, tuned, seen, {"edit": "weights", "lambda_": lambda_})
        yield from self._at_equal_cost(run, base, tuned, line)

    def _at_equal_cost(
        self, run: _Run, base: _Seen, tuned: _Seen, line: Sequence[tuple[float, _Seen]]
    ) -> Iterator[Record]:
        """Yield recovery of interpolated weights at the price of each handle that the run has chosen."""
        gap = kl_divergence(tuned.log_p, base.log_p)
        lambdas = [0.0, *(lambda_ for lambda_, _ in line)]
        nats = torch.stack([gap, *(kl_divergence(tuned.log_p, seen.log_p) for _, seen in line)])
        costs = [float(seen.nats.sum() / base.nats.sum()) - 1 for _, seen in line]
        about: dict[str, Any] = {"question": "rq3", "split": "eval", "positions": "last", "unit": "fraction"}
        for price in _prices(self.earlier):
            edit, k, alpha = (price.params[name] for name in ("edit", "k", "alpha"))
            named = {"edit": "weights_at_equal_cost", "handle": f"{edit}, k = {k}, α = {alpha:g}"}
            about["site"] = price.site
            if not run.pair.shared.identical:  # the line begins in tuned's tokens, where base never was
                unread = {**about, "params": named, "n": len(run.targets)}
                yield missing("interchange_recovery", "tokenizers_differ", unread)
                continue
            place = reach_at_cost(costs, float(price.value or 0.0))
            low = min(int(place), len(line) - 1)
            part = place - low
            params = {
                **named,
                "cost": price.value,
                "cost_n": price.n,
                "lambda_": lambdas[low] + part * (lambdas[low + 1] - lambdas[low]),
            }
            left = nats[low] + part * (nats[low + 1] - nats[low])
            yield self.ratio(left, gap, run.noise, "interchange_recovery", **about, params=params)

    def _records(
        self, run: _Run, base: _Seen, tuned: _Seen, seen: _Seen, params: Mapping[str, Any]
    ) -> Iterator[Record]:
        about: dict[str, Any] = {"question": "rq3", "split": "eval", "positions": "last"}
        target = {**about, "unit": "fraction"}
        left, gap = kl_divergence(tuned.log_p, seen.log_p), kl_divergence(tuned.log_p, base.log_p)
        yield self.ratio(left, gap, run.noise, "interchange_recovery", **target, params=dict(params))
        self._keep(run.targets, "yardstick_kl", params, left.tolist())
        metrics: dict[str, list[tuple[float, ...]]] = defaultdict(list)
        for key, value in seen.graded.items():
            again = abs(run.again[key] - base.graded[key])
            metrics[key[0]].append((tuned.graded[key], base.graded[key], value, again))
        for metric, cells in metrics.items():
            end, start, found, noise = torch.tensor(cells, dtype=torch.float64).unbind(1)
            sign = 1.0 if float((end - start).mean()) >= 0 else -1.0
            cell = {**target, "params": {**params, "metric": metric}}
            yield self.ratio(
                sign * (end - found), sign * (end - start), float(noise.mean()), "steer_effect", **cell
            )
        draws = generator(self.seed, "side_effect_bpb")
        yield fluency_record(seen.nats, base.nats, draws, {**about, "params": dict(params)})
        yield turned_record(seen.answers, base.answers, {**about, "params": dict(params)})
        self._keep(run.neutral, "neutral_nats", params, seen.nats.tolist())

    def _keep(
        self, prompts: Sequence[Prompt], quantity: str, params: Mapping[str, Any], values: Sequence[float]
    ) -> None:
        arm = "/".join(str(value) for value in params.values())
        self.items += [
            Item(p.id, quantity, "", "last", "into_base", arm, x)
            for p, x in zip(prompts, values, strict=True)
        ]


def _prices(earlier: Sequence[Record]) -> Iterator[Record]:
    """Yield what the chosen handles that need no second model cost in fluency."""
    for handle in earlier:
        edit = handle.params.get("edit")
        if handle.quantity != CHOSEN or handle.value is None or edit not in ("mapped", "amplify", "add"):
            continue
        for r in earlier:
            same = (r.site, r.params.get("edit"), r.params.get("k")) == (handle.site, edit, int(handle.value))
            whole = r.quantity == "side_effect_bpb" and r.split == "eval" and is_own(r)
            if whole and same and r.value is not None:
                yield r


class _Run:
    """Measures arms on the same prompts, and on base's own answers to the neutral ones."""

    def __init__(
        self, settings: Yardsticks, pair: LoadedPair, targets: Sequence[Prompt], neutral: Sequence[Prompt]
    ) -> None:
        self.settings, self.pair, self.targets, self.neutral = settings, pair, targets, list(neutral)
        self.openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        graded = [p for p in targets if grades(p, self.openings)]
        self.graded = set(spread(graded, settings.graded_prompts))
        self.engines = {m.role: SuffixEngine(m.model) for m in (pair.base, pair.tuned)}
        self.said = self._answers(pair.base, None)
        same = pair.shared.identical  # else a text is read again, which must not be blank
        kept = [i for i, ids in enumerate(self.said) if ids and (same or self._text(pair.base, ids))]
        if not kept:
            raise PromptError(
                "base answers no neutral prompt of split eval; allowed: one or more (key: pair.prompts)"
            )
        self.neutral, self.said = [self.neutral[i] for i in kept], [self.said[i] for i in kept]

    @cached_property
    def noise(self) -> float:
        """Divergence of base from itself between batches and single prompts, in nats."""
        side = self._side(self.pair.base, None, self.targets[:_NOISE_PROMPTS])
        together, alone = (read_ends(side, [], tokens).log_p for tokens in (10**6, 1))
        return float(kl_divergence(together, alone).mean())

    @cached_property
    def again(self) -> dict[tuple[str, str], float]:
        """Graded behaviour of base, read without keys and values kept: how far it is from itself is noise."""
        side, found = self._side(self.pair.base, None, self.targets), {}
        for i, p in enumerate(self.targets):
            for g in grades(p, self.openings) if p in self.graded else ():
                ids, layout = side.ids(i)[:, :-1], side.lay_out(i, g)
                before = ids.expand(len(layout.tokens), -1)
                tokens = torch.cat([before, layout.tokens], 1)
                mask = torch.cat([torch.ones_like(before), layout.mask.to(before)], 1)
                logits = run_logits(side.loaded.model, tokens, mask, layout.columns + before.shape[1])
                found[g.metric, p.id] = float(g(total_logprobs(logits, layout)))
        return found

    def arm(
        self,
        loaded: LoadedModel,
        system: str | None = None,
        within: AbstractContextManager[Any] | None = None,
    ) -> _Seen:
        """Measure one arm.

        Args:
            loaded: The model that runs.
            system: A system message.
            within: What is done to the model meanwhile.
        """
        settings, base = self.settings, self.pair.base
        with within or nullcontext():
            side = self._side(loaded, system, self.targets)
            log_p = read_ends(side, [], settings.tokens_per_batch).log_p
            graded = {
                (g.metric, p.id): side.grade(i, g)
                for i, p in enumerate(self.targets)
                if p in self.graded
                for g in grades(p, self.openings)
            }
            contexts, said = self._contexts(loaded, system), self.said
            if loaded is not base and not self.pair.shared.identical:
                texts = [str(base.tokenizer.decode(ids)) for ids in self.said]
                said = [loaded.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            nats = answer_nats(loaded.model, contexts, said, tokens_per_batch=settings.tokens_per_batch)
            plain = loaded is base and system is None and within is None
            answers = self.said if plain else self._answers(loaded, system)
        domain = self.pair.spec.domain
        return _Seen(log_p, graded, nats, [turned(self._text(loaded, ids), domain) for ids in answers])

    def _side(self, loaded: LoadedModel, system: str | None, prompts: Sequence[Prompt]) -> Side:
        shared = self.pair.shared.base_ids if loaded is self.pair.base else self.pair.shared.tuned_ids
        encoded = [asked(loaded.tokenizer, p.text, system) for p in prompts]
        return Side(loaded, self.engines[loaded.role], shared.to(loaded.device), encoded)

    def _contexts(self, loaded: LoadedModel, system: str | None) -> list[list[int]]:
        return [asked(loaded.tokenizer, p.text, system).input_ids for p in self.neutral]

    def _answers(self, loaded: LoadedModel, system: str | None) -> list[list[int]]:
        stops = stop_tokens(loaded.model, loaded.tokenizer.eos_token_id)
        reach = answer_reach(loaded, self.settings.answer_chars)
        return generate(loaded.model, self._contexts(loaded, system), reach, stops)

    def _text(self, loaded: LoadedModel, ids: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def asked(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None) -> EncodedPrompt:
    """Encode a message after a system message; before the message itself where the template has no such role.

    Args:
        tokenizer: The model's tokenizer.
        text: The user's message.
        system: The system message, if there is one.
    """
    try:
        return encode(tokenizer, text, system)
    except (PromptError, TemplateError):
        if system is None:
            raise
        return encode(tokenizer, f"{system}\n\n{text}")
