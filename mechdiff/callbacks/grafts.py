"""Grafts: which component's weights carry the difference of two models.

1. Each component of the donor is put into the recipient, in both directions, and read at the last position
   before the answer. Recovery = 1 − mean KL(P_donor ‖ P_grafted) / mean KL(P_donor ‖ P_recipient): 1 makes
   the recipient the donor, 0 does nothing.
2. Control at the blocks that recover most (``random``): what the graft adds to a weight, shuffled within it.
3. Below a grafted block nothing changes, so the recipient's residual is kept and only the block and those
   above it run again. A component that is bitwise equal in both models is not run, nor are two with the same
   differing tensors run twice.
4. Beside it how much each weight changed, and what becomes of the tuned model along theta_base + lambda
   (theta_tuned − theta_base): its divergence from either model, and its graded behaviour.
5. Distributions are renormalised over the tokens that both models have. Each model reads its own tokens, so
   with different tokenizers even ``all`` recovers less than 1: the rest is what the tokens themselves do. Of
   the tables only shared rows are grafted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.graded import grades, read_openings
from mechdiff.callbacks.patcher import Side
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.selection import PROPOSED, largest
from mechdiff.functional.stats import generator
from mechdiff.functional.weights import change_shares, weight_change
from mechdiff.interventions.grafts import (
    Rows,
    changed,
    check_same_architecture,
    comparable,
    component_tensors,
    components,
    graft,
    graft_shuffled,
    interpolate,
)
from mechdiff.interventions.hooks import record
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record

KINDS = ("all", "embed", "block", "attn", "mlp", "norm", "head")
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_NOISE_PROMPTS = 8


@dataclass(frozen=True)
class _Batch:
    """Prompts of similar length without the template's fixed beginning, padded on the right."""

    prompts: list[int]
    tokens: Tensor
    mask: Tensor
    last: Tensor


class Grafts(CausalEvaluation):
    """Grafts components, measures weights, and walks from base to tuned.

    Args:
        kinds: Kinds of components to graft, of ``KINDS``.
        max_prompts: Use at most this many evaluation prompts, evenly over languages and classes; None takes
            all.
        lambdas: Points of the interpolation; none leaves it out.
        effect_prompts: Prompts whose log-odds of refusing and log P(correct) are followed along the
            interpolation, beside the two divergences; 0 leaves them out.
        ranks: Whether to compute the ranks of weight changes, one eigendecomposition per changed matrix.
        tokens_per_batch: Tokens run at once; the residuals of that many tokens are kept at every block.

    Raises:
        ConfigError: If a kind is unknown.
    """

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        max_prompts: int | None = 40,
        lambdas: Sequence[float] = LAMBDAS,
        effect_prompts: int = 12,
        ranks: bool = True,
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"kinds has {unknown[0]!r}; allowed: {', '.join(KINDS)} (key: kinds)")
        self.kinds, self.max_prompts, self.lambdas = tuple(kinds), max_prompts, tuple(lambdas)
        self.effect_prompts = effect_prompts
        self.ranks, self.tokens_per_batch = ranks, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Graft in both directions; nothing fitted is used."""
        rows = shared_rows(pair)
        backwards = None if rows is None else rows[::-1]
        check_same_architecture(pair.tuned.model, pair.base.model, backwards)
        kept = self.kept(pair, prompts, self.max_prompts)[0]
        base, tuned = (
            Side(m, SuffixEngine(m.model), ids.to(m.device), [encode(m.tokenizer, p.text) for p in kept])
            for m, ids in ((pair.base, pair.shared.base_ids), (pair.tuned, pair.shared.tuned_ids))
        )
        clean = {"base": self._distributions(base), "tuned": self._distributions(tuned)}
        yield from self._grafted(kept, tuned, pair.base, clean["base"], backwards, "base_into_tuned")
        yield from self._grafted(kept, base, pair.tuned, clean["tuned"], rows, "tuned_into_base")
        yield from self._weights(pair, rows)
        yield from self._interpolated(kept, pair, tuned, clean, rows)

    def _grafted(
        self,
        prompts: Sequence[Prompt],
        side: Side,
        donor: LoadedModel,
        reference: Tensor,
        rows: Rows | None,
        direction: str,
    ) -> Iterator[Record]:
        """Graft every component of the donor into one side."""
        names = [name for name in components(side.loaded.model) if name.partition(".")[0] in self.kinds]
        differ = {name: changed(side.loaded.model, donor.model, name, rows) for name in names}
        # Of components with the same differing tensors, run the one that leaves the fewest blocks to run.
        runs = {
            differ[name]: name
            for name in sorted(names, key=lambda n: _below(n, side.loaded.depth))
            if differ[name]
        }
        none: frozenset[str] = frozenset()
        values = {key: torch.zeros(len(prompts), dtype=torch.float64) for key in (none, *runs)}
        for batch in _batches(side, self.tokens_per_batch):
            states, unpatched = _read(side, batch)
            values[none][batch.prompts] = kl_divergence(reference[batch.prompts], unpatched).cpu()
            for key, name in runs.items():
                with graft(side.loaded.model, donor.model, name, rows):
                    grafted = _run(side, batch, states, _below(name, side.loaded.depth))
                values[key][batch.prompts] = kl_divergence(reference[batch.prompts], grafted).cpu()
        noise, best = self._noise(side), self._best(names, differ, values)
        control = {name: torch.zeros_like(values[none]) for name in best}
        for batch in _batches(side, self.tokens_per_batch) if best else ():
            states, _ = _read(side, batch)
            for name in best:
                draws = generator(self.seed, "graft_shuffled", name, direction)
                with graft_shuffled(side.loaded.model, donor.model, name, draws, rows):
                    changed_so = _run(side, batch, states, _below(name, side.loaded.depth))
                control[name][batch.prompts] = kl_divergence(reference[batch.prompts], changed_so).cpu()
        columns = [(name, "none", values[differ.get(name, none)]) for name in ("none", *names)]
        columns += [(name, "random", column) for name, column in control.items()]
        for name, arm, column in columns:
            site = f"{Site(_layer(name) or 0)}" if name.startswith("block.") else None
            about: dict[str, Any] = {
                "question": "rq1",
                "site": site,
                "positions": "last",
                "split": "eval",
                "control": arm,
                "params": {"component": name, "direction": direction},
            }
            found = [self.mean(column, "graft_kl", unit="nats", **about)]
            if name != "none":
                found.append(
                    self.ratio(column, values[none], noise, "graft_recovery", unit="fraction", **about)
                )
            partial = ("shared_rows",) if rows is not None and name in ("all", "embed", "head") else ()
            yield from (replace(r, flags=(*r.flags, *partial)) for r in found)
            shown = name if arm == "none" else f"{name}:{arm}"
            self._keep(prompts, "graft_kl", site or "", direction, shown, column)

    def _best(
        self,
        names: Sequence[str],
        differ: Mapping[str, frozenset[str]],
        values: Mapping[frozenset[str], Tensor],
    ) -> list[str]:
        """Return the whole blocks that recover most, of those that differ."""
        blocks = [name for name in names if name.startswith("block.") and differ[name]]
        return [blocks[i] for i in largest([-values[differ[b]].mean().item() for b in blocks], PROPOSED)]

    def _weights(self, pair: LoadedPair, rows: Rows | None) -> Iterator[Record]:
        """Say how much each tensor changed."""
        tuned = pair.tuned.model
        owner: dict[str, str] = {}
        for component in components(tuned):
            if component != "all":  # the parts of a block come after it, and keep what is theirs
                owner |= dict.fromkeys(component_tensors(tuned, component), component)
        pairs = comparable(tuned, pair.base.model, "all", None if rows is None else rows[::-1])
        changes = {
            name: weight_change(old, new, ranks=self.ranks)
            for name, (new, old) in pairs.items()
            if new.is_floating_point()
        }
        shares = change_shares([change.norm for change in changes.values()]).tolist()
        for (name, change), share in zip(changes.items(), shares, strict=True):
            layer, params = _layer(owner[name]), {"component": owner[name], "tensor": name}
            about: dict[str, Any] = {"question": "rq1", "split": "eval", "n": 0, "params": params}
            about["site"] = None if layer is None else str(Site(layer))
            if math.isfinite(change.relative):
                yield Record(quantity="weight_change", value=change.relative, unit="fraction", **about)
            else:
                yield missing("weight_change", "base_is_zero", {**about, "unit": "fraction"})
            yield Record(quantity="weight_share", value=share, unit="fraction", **about)
            for kind, rank in (("stable", change.stable_rank), ("effective", change.effective_rank)):
                if rank:
                    about["params"] = {**params, "kind": kind}
                    yield Record(quantity="weight_rank", value=rank, unit="rank", **about)

    def _interpolated(
        self,
        prompts: Sequence[Prompt],
        pair: LoadedPair,
        side: Side,
        clean: dict[str, Tensor],
        rows: Rows | None,
    ) -> Iterator[Record]:
        """Walk from base to tuned and beyond, in tuned's tokens."""
        about: dict[str, Any] = {"question": "rq1", "positions": "last", "split": "eval"}
        openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        few = set(spread([p for p in prompts if grades(p, openings)], self.effect_prompts))
        followed = [(i, g) for i, p in enumerate(prompts) if p in few for g in grades(p, openings)]
        for lambda_ in self.lambdas:
            with interpolate(pair.base.model, pair.tuned.model, lambda_, rows):
                log_p = clean["tuned"] if lambda_ == 1 else self._distributions(side)
                graded = [(prompts[i], g.metric, side.grade(i, g)) for i, g in followed]
            for role, reference in clean.items():
                column, params = (
                    kl_divergence(reference, log_p).cpu(),
                    {"lambda_": lambda_, "reference": role},
                )
                yield self.mean(column, "interpolation_kl", unit="nats", params=params, **about)
                self._keep(prompts, "interpolation_kl", "", role, f"lambda={lambda_}", column)
            for metric, label in sorted({(m, p.label) for p, m, _ in graded}):
                found = [(p, x) for p, m, x in graded if (m, p.label) == (metric, label)]
                column = torch.tensor([x for _, x in found], dtype=torch.float64)
                params = {"lambda_": lambda_, "metric": metric, "label": label}
                yield self.mean(column, "interpolation_effect", unit="nats", params=params, **about)
                self._keep(
                    [p for p, _ in found], "interpolation_effect", "", metric, f"lambda={lambda_}", column
                )

    def _noise(self, side: Side) -> float:
        """Return the divergence of a model from itself between batches and single prompts."""
        few = replace(side, encoded=side.encoded[:_NOISE_PROMPTS], states=[], log_p=[], lost=[])
        few.read([])
        return kl_divergence(torch.stack(few.log_p), self._distributions(few)).mean().item()

    def _distributions(self, side: Side) -> Tensor:
        """Return a side's log-probabilities over the shared tokens, `(prompts, shared)`."""
        found: dict[int, Tensor] = {}
        for batch in _batches(side, self.tokens_per_batch):
            found |= dict(zip(batch.prompts, _run(side, batch), strict=True))
        return torch.stack([found[i] for i in range(len(found))])

    def _keep(
        self, prompts: Sequence[Prompt], quantity: str, site: str, direction: str, arm: str, column: Tensor
    ) -> None:
        self.items += [
            Item(p.id, quantity, site, "last", direction, arm, x)
            for p, x in zip(prompts, column.tolist(), strict=True)
        ]


def shared_rows(pair: LoadedPair) -> Rows | None:
    """Return shared ids in base and tuned, or None where the two tables have the same rows."""
    sizes = [m.model.get_input_embeddings().weight.shape for m in (pair.base, pair.tuned)]
    same = pair.shared.identical and sizes[0] == sizes[1]
    return None if same else (pair.shared.base_ids, pair.shared.tuned_ids)


def _layer(component: str) -> int | None:
    _, _, layer = component.partition(".")
    return int(layer) if layer else None


def _below(component: str, depth: int) -> int:
    """Return the highest block whose output a graft leaves alone; -1 if there is none."""
    layer = _layer(component)
    if layer is not None:
        return layer - 1
    return depth - 1 if component in ("norm", "head") else -1


def _batches(side: Side, tokens_per_batch: int) -> Iterator[_Batch]:
    start = side.fixed
    lengths = [len(e) - start for e in side.encoded]
    waiting = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    while waiting:
        fitting = (n for n in range(len(waiting), 1, -1) if n * lengths[waiting[n - 1]] <= tokens_per_batch)
        chosen = waiting[: next(fitting, 1)]
        waiting = waiting[len(chosen) :]
        size = torch.tensor([lengths[i] for i in chosen], device=side.loaded.device)
        tokens = pad_sequence([side.ids(i)[0, start:] for i in chosen], batch_first=True)
        mask = (torch.arange(tokens.shape[1], device=tokens.device) < size[:, None]).long()
        yield _Batch(chosen, tokens, mask, size - 1)


def _read(side: Side, batch: _Batch) -> tuple[dict[int, Tensor], Tensor]:
    """Run a model as it is; return the residuals after each block, and what `_run` does."""
    with record(side.loaded.model, [Site(layer) for layer in range(side.loaded.depth)]) as seen:
        log_p = _run(side, batch)
    return {site.layer: states for site, states in seen.items()}, log_p


def _run(side: Side, batch: _Batch, states: Mapping[int, Tensor] | None = None, below: int = -1) -> Tensor:
    """Return log-probabilities over the shared tokens, from a kept residual up if there is one below.

    The template's beginning is run anew each time, one row of it: its keys above a graft are not those of
    before.
    """
    model, start = side.loaded.model, side.fixed
    prefix = side.engine.prefill(side.ids(batch.prompts[0])[:, :start]) if start else None
    if below < 0 or states is None:
        logits = run_logits(model, batch.tokens, batch.mask, batch.last, prefix)
    else:
        logits = side.engine.resume(
            below, states[below], batch.tokens, batch.mask, prefix=prefix, logits_at=batch.last
        )
    return side.restricted(logits)
