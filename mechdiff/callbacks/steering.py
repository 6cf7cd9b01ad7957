"""Steering: how few directions carry the difference, at which strength, and what do they cost?

1. Dev targets: every kind of edit, rank, strength and site is tried at the last position; the effect is
   recovery (`mechdiff.callbacks.sweep_effects`).
2. At the site with the largest effect, and for each kind and rank, the strength with the largest effect among
   those that cost little on dev's neutral prompts is chosen (`mechdiff.callbacks.sweep_costs`).
3. Eval: what was chosen is tested once, beside its controls (`mechdiff.callbacks.sweep_controls`), with its
   fluency and graded behaviour (`mechdiff.callbacks.sweep_behaviour`). The finalists answer target prompts;
   they and the smallest handles that recover a tenth or a fifth answer neutral ones.
4. Read off: the smallest rank that recovers a tenth, a fifth, or nine tenths of what the whole state does.

`interchange` needs the tuned model at every token: it says what a subspace carries, and is no product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from mechdiff.callbacks.base import readable
from mechdiff.callbacks.handle_evaluation import ANSWER, Handle, residuals, subspaces, two_engines
from mechdiff.callbacks.neutral_answers import neutral_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.side_effects import ANSWER_CHARS
from mechdiff.callbacks.sweep_behaviour import generated, graded, translations
from mechdiff.callbacks.sweep_controls import Controls, Random
from mechdiff.callbacks.sweep_costs import Neutral
from mechdiff.callbacks.sweep_effects import Arms, Targets, direction
from mechdiff.callbacks.sweep_report import EDITS, INTO_TUNED, NONE, Key, SweepReport, quantity, smallest
from mechdiff.config import ALPHA_GRID, K_SWEEP
from mechdiff.data.contrast import NEED, Contrast, check_bound, contrast, needed
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

Swept = Mapping[tuple[Site, str], tuple[list[Handle], Arms]]


class Steering(SweepReport):
    """Sweeps over edits, chooses on dev within bounds, and tests once on eval.

    Args:
        edits: Some of `interchange`, `mapped`, `amplify` and `add` into base, `ablate` and `reverse` (the
            interchange back) into tuned.
        ks: Ranks; those beyond the module's are left out.
        alphas: Strengths; 1 is the whole natural edit. `ablate` has no other.
        tested_sites: Sites, by their largest effect, at which strengths are chosen and tested.
        max_dev: Dev targets, evenly over languages; None takes all.
        max_eval: Evaluation targets, the same.
        max_neutral: Neutral prompts of dev and of eval, the same.
        min_neutral: Neutral prompts that each of the two must hold.
        answer_chars: Longest answer, in characters: tokens hold more of one language than of another.
        graded_prompts: Evaluation targets whose graded behaviour is read.
        generated_prompts: Evaluation targets that are answered.
        draws: Random subspaces of each kind, 100 or more to claim an effect.
        random_eval: Evaluation targets on which a random subspace is read, evenly over languages.
        post_embedding_only: Edits act on the outputs of blocks; an embedding is no site.

    Raises:
        ConfigError: If a setting is out of range.
    """

    splits: ClassVar[tuple[str, ...]] = ("dev", "eval")

    def __init__(
        self,
        edits: Sequence[str] = EDITS,
        ks: Sequence[int] = K_SWEEP,
        alphas: Sequence[float] = ALPHA_GRID,
        tested_sites: int = 1,
        max_dev: int | None = None,
        max_eval: int | None = None,
        max_neutral: int | None = None,
        min_neutral: int = NEED,
        answer_chars: int = ANSWER_CHARS,
        graded_prompts: int = 8,
        generated_prompts: int = 16,
        draws: int = 100,
        random_eval: int = 12,
        post_embedding_only: bool = True,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(edits) - set(EDITS)):
            raise ConfigError(f"edits has {unknown[0]!r}; allowed: {', '.join(EDITS)} (key: edits)")
        if "interchange" not in edits:
            raise ConfigError("edits lacks interchange, which all others are compared with (key: edits)")
        if not ks or any(k < 1 for k in ks):
            raise ConfigError(f"ks is {list(ks)}; allowed: whole numbers of 1 or more (key: ks)")
        if not alphas or any(not 0 < alpha < float("inf") for alpha in alphas):
            raise ConfigError(f"alphas is {list(alphas)}; allowed: finite numbers above 0 (key: alphas)")
        for name, value in (
            ("tested_sites", tested_sites),
            ("max_dev", max_dev),
            ("max_eval", max_eval),
            ("max_neutral", max_neutral),
            ("answer_chars", answer_chars),
            ("random_eval", random_eval),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        if not post_embedding_only:
            raise ConfigError(
                "post_embedding_only is false; allowed: true, the first site is the output of block 0 "
                "(key: post_embedding_only)"
            )
        self.edits, self.ks = tuple(edits), sorted(set(ks))
        self.alphas = sorted({float(alpha) for alpha in alphas})
        self.tested_sites, self.max_dev, self.max_eval = tested_sites, max_dev, max_eval
        self.max_neutral, self.min_neutral = max_neutral, min_neutral
        self.answer_chars, self.graded_prompts = answer_chars, graded_prompts
        self.generated_prompts = generated_prompts
        self.draws, self.random_eval = draws, random_eval

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Sweep, choose, test; see the module's docstring."""
        self.finalists = []
        kept, sites, engines = readable(pair, prompts)[0], residuals(module), two_engines(pair)
        parts = {split: self._few(kept, split) for split in self.splits}
        most = len(subspaces(module).basis(sites[-1]))
        if not (ks := [k for k in self.ks if k <= most]):
            raise ConfigError(f"ks is {self.ks}; allowed: 1 to {most}, the rank of the handle (key: ks)")
        self.contrast = subspaces(module).contrast
        wrong = {site: _wrong(site, engines[0].num_layers) for site in sites}
        read = sorted({site for site in (*sites, *wrong.values()) if site is not None})
        dev = Targets(pair, engines, parts["dev"].target, read)
        if not dev.prompts:
            yield missing("interchange_recovery", "not_aligned", {**self._about(sites[-1], "dev"), "n": 0})
            return
        swept: dict[tuple[Site, str], tuple[list[Handle], Arms]] = {}
        for site in self.track(sites, "sweep"):
            for where in self.directions:
                cells = self._grid(module, site, where, ks)
                swept[site, where] = cells, dev.sweep(module, site, cells)
                yield from self._curve(*swept[site, where])
        arms = {site: swept[site, "into_base"][1] for site in sites}
        if not self.gap(arms[sites[0]].gap, arms[sites[0]].noise, {"positions": "last"}):
            yield from self._nothing(sites[-1], len(dev.prompts))
            return
        best = {site: float(found.recovery().max()) for site, found in arms.items()}
        tested = sorted(sites, key=lambda site: (best[site], site), reverse=True)[: self.tested_sites]
        final = Targets(pair, engines, parts["eval"].target, read)
        neutral = {split: part.neutral for split, part in parts.items()}
        sides = {split: neutral_sides(pair, engines, few) for split, few in neutral.items()}
        costs: dict[str, dict[str, Neutral]] = {split: {} for split in parts}
        for where in self.directions:
            costs["dev"][where] = self._neutral(module, pair, sides["dev"], neutral["dev"], tested, where)
        for site in self.track(tested, "tests"):
            chosen: dict[Key, Handle] = {}
            able: set[Key] = set()
            for where in self.directions:
                queues = _queues(*swept[site, where])
                able |= set(queues)
                picked, tried = costs["dev"][where].choose(queues)
                chosen |= picked
                for cell, cost in tried.items():
                    about = self._about(site, "dev", cell, ANSWER)
                    yield from costs["dev"][where].records(cell, cost, about)
            yield from self._chosen(site, chosen, swept, able, len(dev.prompts))
            for where in sorted({direction(cell.kind) for cell in chosen.values()} - set(costs["eval"])):
                given = sides["eval"], neutral["eval"]
                costs["eval"][where] = self._neutral(module, pair, *given, tested, where)
            controls = Controls(subspaces(module), site, ks, self.alphas, dev, final, self.seed)
            yield from self._controls(controls, wrong[site])
            random = self._drawn(module, controls, chosen)
            yield from self._tested(module, site, ks, chosen, final, costs["eval"], random, able)
            yield from self._ranks(module, site, ks, final)
            yield from self._behaviour(module, pair, site, chosen, final)

    # --- what is tried --------------------------------------------------------------------------------------

    def _few(self, prompts: Sequence[Prompt], split: Any) -> Contrast:
        """Return the prompts of a split, enough neutral ones among them."""
        if not self.fast:
            check_bound(prompts, split, self.min_neutral)
        both = contrast(prompts, split)
        most = {"dev": self.max_dev, "eval": self.max_eval}[split]
        return Contrast(spread(both.target, most), spread(both.neutral, self.max_neutral))

    def _grid(self, module: DiffModule, site: Site, where: str, ks: Sequence[int]) -> list[Handle]:
        cells = []
        for kind in (kind for kind in self.edits if direction(kind) == where):
            solver = self._solver(module, kind)
            for k in ks if kind != "add" else [1]:
                for alpha in self.alphas if kind != "ablate" else [1.0]:
                    cells.append(Handle(site, kind, k, alpha, solver))
        return cells

    def _solver(self, module: DiffModule, kind: str) -> str:
        """Return who found the directions of a kind: `add` is the difference in means itself."""
        means = kind == "add" and "diff_mean" in subspaces(module).solvers
        return "diff_mean" if means else module.solver_name

    @property
    def directions(self) -> list[str]:
        """Which models are edited."""
        return sorted({direction(kind) for kind in self.edits})

    def _neutral(
        self,
        module: DiffModule,
        pair: LoadedPair,
        sides: tuple[Side, Side],
        prompts: Sequence[Prompt],
        sites: Sequence[Site],
        where: str,
    ) -> Neutral:
        """Let the model that is edited answer neutral prompts of one split, which both have read."""
        mine, other = sides if where == "into_base" else sides[::-1]
        ids, chars = translations(pair)[where], self.answer_chars
        found = Neutral(module, mine, other, sites, pair.spec.domain, ids, chars, self.seed)
        if not self.fast:  # as many as are left
            check_bound(prompts[: len(found.kept)], prompts[0].split, min(self.min_neutral, needed()))
        return found

    # --- what is tested -------------------------------------------------------------------------------------

    def _controls(self, controls: Controls, wrong: Site | None) -> Iterator[Record]:
        """Yield every control but the random subspaces."""
        site = controls.site
        for outcome in controls.named(self.data, wrong):
            control = outcome.control
            for i, (k, alpha) in enumerate(zip(control.ks, outcome.alphas, strict=True)):
                cell = Handle(site, control.kind, k, alpha, control.solver)
                more = {"written_at": str(control.site)} if control.site != site else {}
                about = {**self._about(site, "eval", cell, **more), "control": control.name}
                yield self._share(outcome.arms, i, "interchange_recovery", about)

    def _drawn(self, module: DiffModule, controls: Controls, chosen: Mapping[Key, Handle]) -> list[Random]:
        """Draw random subspaces beside the interchange of every rank, and every other chosen edit of base."""
        if not self.draws:
            return []
        site, solver = controls.site, self._solver(module, "interchange")
        cells = [Handle(site, "interchange", k, 1.0, solver) for k in controls.ks]
        cells += [
            replace(cell, alpha=1.0)
            for cell in chosen.values()
            if direction(cell.kind) == "into_base" and cell.kind != "interchange"
        ]
        found = controls.random(cells, self.draws, self.random_eval)
        return list(self.track(found, "random subspaces"))

    def _tested(
        self,
        module: DiffModule,
        site: Site,
        ks: Sequence[int],
        chosen: Mapping[Key, Handle],
        final: Targets,
        neutral: Mapping[str, Neutral],
        random: Sequence[Random],
        able: Collection[Key],
    ) -> Iterator[Record]:
        """Yield effects and costs on evaluation prompts."""
        shares: dict[Key, Record] = {}
        few: dict[Key, Record | None] = {}
        for kind, k in ((name, k) for name in self.edits for k in (ks if name != "add" else [1])):
            if (kind, k) not in chosen:
                cell = Handle(site, kind, k, 0.0, self._solver(module, kind))
                about = self._about(site, "eval", cell, alpha=None, **_metric(kind))
                reason = NONE[(kind, k) in able]
                yield missing(quantity(kind), reason, {**about, "n": len(final.prompts)})
        for where, measured in neutral.items():
            cells = [cell for cell in chosen.values() if direction(cell.kind) == where]
            if not cells:
                continue
            arms = final.sweep(module, site, cells)
            costs = measured.costs(cells, [*self.finalists, *smallest(cells, arms)])
            for i, (cell, cost) in enumerate(zip(cells, costs, strict=True)):
                found = measured.records(cell, cost, self._about(site, "eval", cell, ANSWER))
                yield from found
                flags = tuple(dict.fromkeys(flag for r in found for flag in r.flags))
                few[cell.kind, cell.k] = self._on_few(arms, i, cell, random)
                flags += self._beside(few[cell.kind, cell.k], cell, random)
                about = {**self._about(site, "eval", cell, **_metric(cell.kind)), "flags": flags}
                shares[cell.kind, cell.k] = self._share(arms, i, quantity(cell.kind), about)
                yield shares[cell.kind, cell.k]
                yield self._wrong_way(arms, i, cell)
                self._keep([p.id for p in final.prompts], cell, "kl", arms.nats[:, i])
        for r in random:
            yield self._random(site, r, self._solver(module, r.kind), few.get((r.kind, r.k)))
        yield from self._small(site, ks, shares, able)

    def _ranks(self, module: DiffModule, site: Site, ks: Sequence[int], final: Targets) -> Iterator[Record]:
        """Yield the rank of the difference by every estimator of more than one direction."""
        holds = subspaces(module)
        for solver in holds.solvers:
            able = [k for k in ks if k <= len(holds.basis(site, solver))]
            if max(able, default=1) == 1 and solver != module.solver_name:
                continue
            cells = [Handle(site, "interchange", k, 1.0, solver) for k in able]

            def edited(index: int, cells: Sequence[Handle] = cells) -> torch.Tensor:
                own, donor = final.states(index, site, "into_base")
                return torch.cat([*(cell.change(module, own, donor) for cell in cells), donor])

            width = holds.delta.shape[-1]
            yield from self._rank(site, solver, able, final.run(site, "into_base", edited), width)

    def _behaviour(
        self,
        module: DiffModule,
        pair: LoadedPair,
        site: Site,
        chosen: Mapping[Key, Handle],
        final: Targets,
    ) -> Iterator[Record]:
        """Yield what everything chosen does to graded behaviour, and the finalists to answers."""
        cells, finalists = list(chosen.values()), [c for c in chosen.values() if c in self.finalists]
        if not cells:
            return
        read = list(graded(module, pair, final, cells, self.graded_prompts)) if self.graded_prompts else []
        said = []
        if finalists and self.generated_prompts:
            sizes = self.generated_prompts, self.answer_chars
            said = list(generated(module, pair, final, finalists, translations(pair), *sizes))
        yield from self._behaviours(read, said)


def _wrong(site: Site, layers: int) -> Site | None:
    """Return where the control of another layer is written; None if there is no other layer."""
    layer = site.layer // 2 if site.layer else layers // 2
    return None if layer == site.layer else Site(layer)


def _metric(kind: str) -> dict[str, str]:
    """Return what tells recovery from behaviour, where both have one name."""
    return {"metric": "recovery"} if kind in INTO_TUNED else {}


def _queues(cells: Sequence[Handle], arms: Arms) -> dict[Key, list[Handle]]:
    """Return, by kind and rank, the edits that do anything, the largest effect first."""
    found: dict[Key, list[tuple[float, Handle]]] = {}
    for cell, effect in zip(cells, arms.recovery().tolist(), strict=True):
        if effect > 0:
            found.setdefault((cell.kind, cell.k), []).append((effect, cell))
    return {
        key: [cell for _, cell in sorted(held, key=lambda pair: (-pair[0], pair[1].alpha))]
        for key, held in found.items()
    }
