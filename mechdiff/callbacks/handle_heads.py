"""HandleHeads: which heads write what the handle reads?

1. Heads at and below the handle's site are ranked by how far their contributions to the residual differ
   between the models inside the handle, |U(r_tuned − r_base)| at the last position of dev targets. The
   highest are tried, and as many drawn from the rest.
2. Into tuned is put, one head at a time: base's contribution (`swap`), nothing (`zero`), or tuned's mean over
   all dev prompts (`mean`); everything above runs again, at the last position.
3. Path patching puts base's contribution in too, and holds up to the receiver, the residual at the site,
   either all other heads as they are while MLPs and norms are recomputed (freeze: heads), or everything
   (freeze: all). What is above the site runs again.
4. Effects are the share of the way to base's state inside the handle, and recovery of base's next-token
   distribution.

Source: Wang et al. 2022 (arXiv:2211.00593), section 3 (path patching); the choices of freeze, norm and
receiver are named because they differ between authors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechdiff.callbacks.base import Item, readable
from mechdiff.callbacks.handle_evaluation import (
    LAST,
    Handle,
    HandleEvaluation,
    same_end,
    two_engines,
    two_sides,
)
from mechdiff.callbacks.patcher import Side
from mechdiff.data.contrast import contrast
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError, PairError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import generator
from mechdiff.interventions.head_patching import adds_up
from mechdiff.interventions.hooks import Edit, intervene, record
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import run_logits
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

MODES = ("swap", "zero", "mean")
FREEZE = {"total": "none", "mlps": "heads", "direct": "all"}
"""What is held up to the site, by path."""
GROUPS = ("attribution", "random")
Head = tuple[int, int]  # layer, query head


@dataclass(frozen=True)
class _Cell:
    """One head, what is put in its place, and along which path."""

    head: Head
    mode: str
    path: str


class HandleHeads(HandleEvaluation):
    """Patches single heads of tuned and reads the handle.

    Args:
        k: Number of directions; by default those that the run chose, else 4.
        top: Heads with the highest attribution.
        drawn: Heads drawn from the rest.
        modes: What is put in a head's place, some of ``swap``, ``zero``, ``mean``.
        max_prompts: Dev targets, evenly over languages; as many neutral ones enter the mean.
        rows_per_batch: Heads run at once.

    Raises:
        ConfigError: If a mode is unknown, or a number below 1.
    """

    splits: ClassVar[tuple[str, ...]] = ("dev",)

    def __init__(
        self,
        k: int | None = None,
        top: int = 32,
        drawn: int = 32,
        modes: Sequence[str] = MODES,
        max_prompts: int = 8,
        rows_per_batch: int = 48,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(modes) - set(MODES)):
            raise ConfigError(f"modes has {unknown[0]!r}; allowed: {', '.join(MODES)} (key: modes)")
        for name, value in (("top", top), ("max_prompts", max_prompts), ("rows_per_batch", rows_per_batch)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        self.k, self.top, self.drawn, self.modes = k, top, drawn, tuple(modes)
        self.max_prompts, self.rows_per_batch = max_prompts, rows_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Rank heads and patch them; see the module's docstring."""
        if pair.base.num_heads != pair.tuned.num_heads or pair.base.depth != pair.tuned.depth:
            counts = " and ".join(f"{m.depth} x {m.num_heads}" for m in (pair.base, pair.tuned))
            raise PairError(f"the models have {counts} heads; allowed: the same heads in both (key: pair)")
        handle = self.handle(module, "interchange", self.k, None)
        basis = handle.basis(module).double().cpu()
        both = contrast(readable(pair, prompts)[0], "dev")
        few = spread(both.target, self.max_prompts), spread(both.neutral, self.max_prompts)
        base, tuned = two_sides(pair, [*few[0], *few[1]], two_engines(pair))
        able = [i for i, same in enumerate(same_end(base, tuned)) if same and i < len(few[0])]
        if not able:
            yield missing("head_path_effect", "not_aligned", {**self._about(handle), "n": 0})
            return
        for side in (base, tuned):
            side.read([handle.site])
        heads = [_contributions(side, handle.site.layer) for side in (base, tuned)]
        groups = self._choose(basis, [(a[i], b[i]) for a, b in [heads] for i in able])
        direct = adds_up(tuned.loaded.model, handle.site.layer)
        cells = [_Cell(h, m, "total") for part in groups.values() for h in part for m in self.modes]
        for path in ("mlps", "direct") if direct else ("mlps",):
            cells += [_Cell(h, "swap", path) for part in groups.values() for h in part]
        mean = torch.stack(heads[1]).mean(0)
        columns: dict[_Cell, list[tuple[float, float]]] = defaultdict(list)
        gaps: list[tuple[float, float, float]] = []
        for i in self.track(able, "heads"):
            new = {"swap": heads[0][i], "zero": torch.zeros_like(mean), "mean": mean}
            moved, log_p = self._run(tuned, i, handle.site, cells, new, heads[1][i])
            own, wanted = (side.states[i][handle.site][-1].double().cpu() for side in (tuned, base))
            gap = (wanted - own) @ basis.T
            shares = (moved.double().cpu() - own) @ basis.T @ gap
            reference = base.log_p[i].cpu()
            nats = kl_divergence(reference.expand_as(log_p), log_p)
            gaps.append(
                (float(gap @ gap), float(kl_divergence(reference, tuned.log_p[i].cpu())), float(nats[0]))
            )
            for cell, share, kl in zip(cells, shares[1:].tolist(), nats[1:].tolist(), strict=True):
                columns[cell].append((share, kl))
        yield from self._records(handle, groups, columns, gaps, [few[0][i].id for i in able])

    def _choose(self, basis: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[Head]]:
        """Return the heads with the highest attribution, and others."""
        size = torch.stack([((b - a).double() @ basis.T).norm(dim=-1) for a, b in pairs]).mean(0)
        heads = [(layer, head) for layer in range(size.shape[0]) for head in range(size.shape[1])]
        order = [heads[i] for i in size.flatten().argsort(descending=True, stable=True).tolist()]
        top, rest = order[: self.top], order[self.top :]
        picks = torch.randperm(len(rest), generator=generator(self.seed, "heads"))[: self.drawn]
        return {"attribution": top, "random": sorted(rest[i] for i in picks.tolist())}

    def _run(
        self,
        tuned: Side,
        index: int,
        site: Site,
        cells: Sequence[_Cell],
        new: Mapping[str, Tensor],
        old: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return residuals at the site and log-probabilities, the first of the model as it is."""
        run = [c for c in cells if c.path != "direct"]
        assert run == list(cells[: len(run)]), "cells that run come first"
        ids, prefix = tuned.ids(index)[:, -1:], tuned.prefixes[index]
        states, log_p = [], []
        for start in range(0, 1 + len(run), self.rows_per_batch):
            rows = [None, *run][start : start + self.rows_per_batch]
            edits = _edits(rows, new, old)
            with intervene(tuned.loaded.model, edits), record(tuned.loaded.model, [site]) as seen:
                logits = run_logits(tuned.loaded.model, ids.expand(len(rows), -1), prefix=prefix)
            states.append(seen[site][:, 0])
            log_p.append(tuned.restricted(logits).cpu())
        own = tuned.states[index][site][-1]
        changes = [(new[c.mode] - old)[c.head] for c in cells[len(run) :]]
        for start in range(0, len(changes), self.rows_per_batch):
            hidden = own + torch.stack(changes[start : start + self.rows_per_batch]).to(own)
            rows_ids = ids.expand(len(hidden), -1)
            logits = tuned.engine.resume(site.layer, hidden[:, None], rows_ids, prefix=prefix)
            states.append(hidden)
            log_p.append(tuned.restricted(logits).cpu())
        return torch.cat(states), torch.cat(log_p)

    def _records(
        self,
        handle: Handle,
        groups: Mapping[str, Sequence[Head]],
        columns: Mapping[_Cell, Sequence[tuple[float, float]]],
        gaps: Sequence[tuple[float, float, float]],
        names: Sequence[str],
    ) -> Iterator[Record]:
        """Yield both effects of every cell, and their mean size by group."""
        inside, nats, clean = torch.tensor(gaps, dtype=torch.float64).unbind(1)
        noise = float((clean - nats).abs().mean())
        sizes: dict[tuple[str, str, str], list[Tensor]] = defaultdict(list)
        for cell, rows in columns.items():
            group = next(name for name, heads in groups.items() if cell.head in heads)
            share, left = torch.tensor(rows, dtype=torch.float64).unbind(1)
            said = ".".join(map(str, cell.head))
            for metric, numerator, gap, floor in (
                ("projection", inside - share, inside, 0.0),
                ("recovery", left, nats, noise),
            ):
                about = self._about(handle, cell, group, head=said, metric=metric)
                yield self.ratio(numerator, gap, floor, "head_path_effect", **about)
            sizes[group, cell.mode, cell.path].append(share.abs())
            for name, x in zip(names, share.tolist(), strict=True):
                arm = f"{said}/{cell.mode}/{cell.path}"
                self.items.append(
                    Item(name, "handle_projection", str(handle.site), "last", "into_tuned", arm, x)
                )
        for (group, mode, path), found in sizes.items():
            size = torch.stack(found).mean(0)
            about = self._about(
                handle, _Cell((0, 0), mode, path), group, head="mean", metric="projection_size"
            )
            yield self.ratio(inside - size, inside, 0.0, "head_path_effect", **about)

    def _about(
        self, handle: Handle, cell: _Cell | None = None, group: str = GROUPS[0], **more: Any
    ) -> dict[str, Any]:
        chosen = self.about(handle, LAST, **more)
        params = {name: x for name, x in chosen["params"].items() if name not in ("edit", "alpha")}
        if cell is not None:
            params |= {"mode": cell.mode, "path": cell.path, "group": group, "freeze": FREEZE[cell.path]}
            params |= {"norm": "recompute", "receiver": str(handle.site)}
        return {
            "question": "rq3",
            "site": str(handle.site),
            "split": "dev",
            "positions": "last",
            "unit": "fraction",
            "control": "random" if group == "random" else "none",
            "flags": chosen.get("flags", ()),
            "params": params,
        }


def _contributions(side: Side, last: int) -> list[Tensor]:
    """Return what every head up to a layer adds at the last token, `(layers, heads, d)` for each prompt."""
    sites = [Site(layer, "head_out") for layer in range(last + 1)]
    found = []
    with record(side.loaded.model, sites) as seen:
        for index, prefix in enumerate(side.prefixes):
            run_logits(side.loaded.model, side.ids(index)[:, -1:], prefix=prefix)
            found.append(torch.stack([seen[site][0, 0].cpu() for site in sites]))
    return found


def _edits(rows: Sequence[_Cell | None], new: Mapping[str, Tensor], old: Tensor) -> dict[Site, Edit]:
    """Return edits of a batch of single tokens: each row has one head replaced, and all others held or none.

    Args:
        rows: What is done to each row.
        new: What is put in a head's place, by mode, `(layers, heads, d)`.
        old: What heads add without it, the same.
    """
    held = torch.tensor([cell is not None and cell.path == "mlps" for cell in rows])
    by_layer: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for row, cell in enumerate(rows):
        if cell is not None:
            layer, head = cell.head
            by_layer[layer].append((row, head, new[cell.mode][layer, head]))

    def edit(layer: int) -> Edit:
        def run(value: Tensor, _positions: Tensor) -> Tensor:
            changed = value.clone()
            changed[held.to(value.device)] = old[layer].to(value)
            for row, head, state in by_layer[layer]:
                changed[row, 0, head] = state.to(value)
            return changed

        return run

    layers = range(len(old)) if held.any() else sorted(by_layer)
    return {Site(layer, "head_out"): edit(layer) for layer in layers}
