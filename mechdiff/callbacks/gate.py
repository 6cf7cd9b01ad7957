"""Gate: steer only where a probe says that the prompt calls for it.

1. A linear probe is fitted to base's stored states of training prompts at the handle's site, target against
   neutral. Its threshold is the largest that still fires on a wanted share of dev targets.
2. A prompt is decided once, by the state of its last token before anything is edited; the decision, a mask
   over the rows of a batch, holds while its answer is decoded. A row that is spared is base, bit for bit.
3. Gated and unconditional steering are compared on evaluation prompts: recovery on targets, fluency and
   turned answers on neutral ones (`mechdiff.callbacks.side_effects`), and the shares that fire. As a control,
   a probe whose labels were shuffled gets its threshold in the same way.

Rows do not touch each other, so that what a gated batch gives is, prompt by prompt, what base or the
unconditional edit gives; both are run once and combined.

Source: Lee et al. 2024 (arXiv:2409.05907), section 3 (condition, then steer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechdiff.callbacks.base import Item, readable
from mechdiff.callbacks.handle_evaluation import (
    ANSWER,
    LAST,
    Handle,
    HandleEvaluation,
    two_engines,
    two_sides,
)
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
from mechdiff.callbacks.transfer_fit import StoredRows, stored_rows
from mechdiff.data.contrast import contrast
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.probes import Probe, best_probe, keeping
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import generator
from mechdiff.interventions.generation import generate, stop_tokens
from mechdiff.interventions.hooks import Edit, intervene
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule, estimated
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

KINDS = ("mapped", "add", "amplify")
"""Edits that need no second model."""
GATES = {"none": "none", "linear": "none", "shuffled": "shuffled"}
"""Gates, and the control that each is."""


class Gate(HandleEvaluation):
    """Compares a gated handle with an unconditional one.

    Args:
        kind: The edit, of ``mapped``, ``add`` and ``amplify``.
        k: Number of directions; by default those that the run chose, else 4.
        alpha: Strength; by default the one that the run chose, else 1.
        keep: Share of dev targets on which the gate must fire.
        shrinkage: Of the probe's scatter.
        max_dev: Dev targets that set the threshold, evenly over languages; None takes all.
        max_targets: Evaluation targets, the same.
        max_neutral: Neutral evaluation prompts, the same.
        answer_chars: Longest answer, in characters.
        tokens_per_batch: Tokens run at once.

    Raises:
        ConfigError: If the kind is not allowed, or a number out of range.
    """

    splits: ClassVar[tuple[str, ...]] = ("dev", "eval")

    def __init__(
        self,
        kind: str = "mapped",
        k: int | None = None,
        alpha: float | None = None,
        keep: float = 0.95,
        shrinkage: float = 0.1,
        max_dev: int | None = 40,
        max_targets: int | None = 24,
        max_neutral: int | None = 64,
        answer_chars: int = ANSWER_CHARS,
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; allowed: {', '.join(KINDS)} (key: kind)")
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is {keep}; allowed: above 0, at most 1 (key: keep)")
        if answer_chars < 1:
            raise ConfigError(f"answer_chars is {answer_chars}; allowed: 1 or more (key: answer_chars)")
        self.kind, self.k, self.alpha, self.keep, self.shrinkage = kind, k, alpha, keep, shrinkage
        self.max_dev, self.max_targets, self.max_neutral = max_dev, max_targets, max_neutral
        self.answer_chars, self.tokens_per_batch = answer_chars, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Fit a gate and compare; see the module's docstring."""
        if self.data is None:
            raise ConfigError("Gate needs the activations of a fit (key: data.class_path)")
        handle = self.handle(module, self.kind, self.k, self.alpha)
        kept = readable(pair, prompts)[0]
        dev, final = spread(contrast(kept, "dev").target, self.max_dev), contrast(kept, "eval")
        targets, neutral = spread(final.target, self.max_targets), spread(final.neutral, self.max_neutral)
        engines = two_engines(pair)
        rows = stored_rows(self.data, "train", str(handle.site))
        fires = {"none": torch.ones(len(targets) + len(neutral), dtype=torch.bool)}
        states = self._states(pair, engines, handle.site, [*dev, *targets, *neutral])
        for name, probe in self._probes(rows).items():
            threshold = keeping(probe(states[: len(dev)]), self.keep)
            fires[name] = probe(states[len(dev) :]) >= threshold
        yield from self._fired(handle, fires, targets, neutral)
        yield from self._recovered(module, pair, engines, handle, fires, targets)
        yield from self._cost(module, pair, engines, handle, fires, len(targets), neutral)

    def _probes(self, rows: StoredRows) -> dict[str, Probe]:
        draws = generator(self.seed, "gate")
        mixed = rows.target[torch.randperm(len(rows.target), generator=draws)]
        return {
            name: best_probe(rows.base[labels], rows.base[~labels], self.shrinkage)
            for name, labels in (("linear", rows.target), ("shuffled", mixed))
        }

    def _states(
        self,
        pair: LoadedPair,
        engines: tuple[SuffixEngine, SuffixEngine],
        site: Site,
        prompts: Sequence[Prompt],
    ) -> Tensor:
        base, _ = two_sides(pair, prompts, engines)
        return read_ends(base, [site], self.tokens_per_batch).states[site]

    def _fired(
        self,
        handle: Handle,
        fires: Mapping[str, Tensor],
        targets: Sequence[Prompt],
        neutral: Sequence[Prompt],
    ) -> Iterator[Record]:
        """Yield the shares of targets and of neutral prompts on which each gate fires."""
        for name in ("linear", "shuffled"):
            split = fires[name].split([len(targets), len(neutral)])
            for label, mask, prompts in zip(("target", "neutral"), split, (targets, neutral), strict=True):
                found = binomial_interval(int(mask.sum()), len(mask))
                about = self._about(handle, name, metric="fires", label=label, keep=self.keep)
                yield estimated("gated_effect", found, {**about, "unit": "fraction"})
                self._keep(prompts, "gate_fires", handle.site, name, mask.tolist())

    def _recovered(
        self,
        module: DiffModule,
        pair: LoadedPair,
        engines: tuple[SuffixEngine, SuffixEngine],
        handle: Handle,
        fires: Mapping[str, Tensor],
        targets: Sequence[Prompt],
    ) -> Iterator[Record]:
        """Yield how much of tuned's next-token distribution each gate lets the handle restore."""
        base, tuned = two_sides(pair, targets, engines)
        base.read([handle.site])
        reference = read_ends(tuned, [], self.tokens_per_batch).log_p
        before = kl_divergence(reference, torch.stack(base.log_p).cpu())
        rows = [self._next_token(module, base, index, handle) for index in range(len(targets))]
        own, edited = (torch.stack(part) for part in zip(*rows, strict=True))
        noise = float(kl_divergence(torch.stack(base.log_p).cpu(), own).mean())
        after = kl_divergence(reference, edited)
        for name, control in GATES.items():
            left = torch.where(fires[name][: len(targets)], after, before)
            about = {**self._about(handle, name, metric="recovery"), "control": control, "unit": "fraction"}
            yield self.ratio(left, before, noise, "gated_effect", **about)
            if name != "none":  # what the gate takes away or adds, prompt by prompt
                about["params"] = {**about["params"], "metric": "recovery_difference"}
                yield self.ratio(before - (after - left), before, noise, "gated_effect", **about)
            self._keep(targets, "gated_kl", handle.site, name, left.tolist())

    def _next_token(
        self, module: DiffModule, base: Side, index: int, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        state = base.states[index][handle.site][-1:]
        hidden = torch.stack([state, handle.change(module, state)])
        ids = base.ids(index)[:, -1:].expand(2, -1)
        logits = base.engine.resume(handle.site.layer, hidden, ids, prefix=base.prefixes[index])
        own, edited = base.restricted(logits).cpu()
        return own, edited

    def _cost(
        self,
        module: DiffModule,
        pair: LoadedPair,
        engines: tuple[SuffixEngine, SuffixEngine],
        handle: Handle,
        fires: Mapping[str, Tensor],
        first: int,
        neutral: Sequence[Prompt],
    ) -> Iterator[Record]:
        """Yield the side effects under each gate."""
        loaded, domain = pair.base, pair.spec.domain
        side, _ = two_sides(pair, neutral, engines)
        contexts = [e.input_ids for e in side.encoded]
        stops = stop_tokens(loaded.model, loaded.tokenizer.eos_token_id)
        reach = answer_reach(loaded, self.answer_chars)
        said = generate(loaded.model, contexts, reach, stops)
        with intervene(loaded.model, {handle.site: everywhere(module, handle)}):
            changed = generate(loaded.model, contexts, reach, stops)
        answers = [
            torch.tensor([turned(self._text(pair, ids), domain) for ids in part]) for part in (said, changed)
        ]
        able = [i for i, ids in enumerate(said) if ids]
        pairs = [contexts[i] for i in able], [said[i] for i in able]
        before = answer_nats(loaded.model, *pairs, tokens_per_batch=self.tokens_per_batch)
        after = answer_nats(
            loaded.model,
            *pairs,
            lambda _, where: handle.edits(module, where),
            self.tokens_per_batch,
        )
        for name, control in GATES.items():
            fired = fires[name][first:]
            about = {**self._about(handle, name, ANSWER), "control": control}
            nats = torch.where(fired[able], after, before)
            yield fluency_record(nats, before, generator(self.seed, "side_effect_bpb"), about)
            mixed = torch.where(fired, answers[1], answers[0]).tolist()
            yield turned_record(mixed, answers[0].tolist(), about)
            self._keep([neutral[i] for i in able], "gated_nats", handle.site, name, nats.tolist())

    def _text(self, pair: LoadedPair, ids: Sequence[int]) -> str:
        return str(pair.base.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _about(self, handle: Handle, gate: str, acts_on: str = LAST, **more: Any) -> dict[str, Any]:
        return {
            "question": "rq3",
            "site": str(handle.site),
            "split": "eval",
            "positions": "last",
            "control": GATES[gate],
            **self.about(handle, acts_on, gate=gate, **more),
        }

    def _keep(
        self, prompts: Sequence[Prompt], quantity: str, site: Site, arm: str, values: Sequence[float]
    ) -> None:
        self.items += [
            Item(p.id, quantity, str(site), "last", "into_base", arm, float(x))
            for p, x in zip(prompts, values, strict=True)
        ]


def everywhere(module: DiffModule, handle: Handle) -> Edit:
    """Return the edit of a batch that is decoded: it acts on the last token of every forward.

    With padding on the left these are the last token of each prompt and then every token of its answer.

    Args:
        module: The fitted subspaces.
        handle: What is done.
    """

    def edit(activation: Tensor, _positions: Tensor) -> Tensor:
        return torch.cat([activation[:, :-1], handle.change(module, activation[:, -1:])], 1)

    return edit
