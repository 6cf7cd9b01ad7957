"""LayerPatch: at which layer does one model's state make the other behave like it?

1. The donor's residual replaces the recipient's at one site, in both directions, at the last position before
   the answer and at all aligned positions.
2. Recovery = 1 − mean KL(P_donor ‖ P_patched) / mean KL(P_donor ‖ P_recipient): 1 makes the recipient the
   donor; breaking a model cannot mimic it. Beside it how far the patch moves the recipient,
   KL(P_recipient ‖ P_patched), and what it does to the log-odds of refusing and to log P(correct).
3. The curve over all sites is read on some prompts. All prompts and the controls of
   `mechdiff.callbacks.layer_patcher` are run at the layers that the divergence proposes.
4. Patching above a change undoes it at every later layer, so increments of the curve stand beside it, and
   `patch_onset`: the first site whose recovery exceeds a floor with the lower end of its interval. If the
   order of layers by recovery is not that by divergence, the chosen layers are flagged.
5. Where the pair names a third model, its states are compared and patched in as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item, spread
from mechdiff.callbacks.graded import Openings, read_openings
from mechdiff.callbacks.layer_effects import effects
from mechdiff.callbacks.layer_patcher import Columns, LayerPatcher, to_donor, unpatched, wrong_site
from mechdiff.callbacks.patcher import Direction, Side, Where
from mechdiff.callbacks.third_model import nearer, similarities
from mechdiff.data.prompts import Prompt
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.selection import ONSET_FLOOR, PROPOSED, agree, largest, onset
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.voice import voices
from mechdiff.results import Record

WHERE: tuple[Where, ...] = get_args(Where)


class LayerPatch(CausalEvaluation):
    """Patches the states of one model into the other, layer by layer.

    Args:
        curve_prompts: Evaluation prompts of the curve over layers, evenly over languages and classes.
        max_prompts: Prompts at the proposed layers; None takes all.
        everywhere_prompts: The same where all positions are patched, which costs as many tokens; 0 leaves
            these patches out.
        effect_prompts: Prompts of the curve whose log-odds of refusing and log P(correct) are read, the
            costliest part; 0 leaves it out.
        floor: Recovery that counts as an effect, a fraction.
        tokens_per_batch: Tokens run at once when all positions are patched.

    Raises:
        ConfigError: If a number of prompts is below 0, or the floor not between 0 and 1.
    """

    def __init__(
        self,
        curve_prompts: int = 40,
        max_prompts: int | None = None,
        everywhere_prompts: int = 40,
        effect_prompts: int = 16,
        floor: float = ONSET_FLOOR,
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        counts = {"max_prompts": max_prompts, "everywhere_prompts": everywhere_prompts}
        counts |= {"curve_prompts": curve_prompts, "effect_prompts": effect_prompts}
        for name, count in counts.items():
            if count is not None and count < 0:
                raise ConfigError(f"{name} is {count}; allowed: 0 or more (key: {name})")
        if not 0 <= floor < 1:
            raise ConfigError(f"floor is {floor}; allowed: from 0 to below 1 (key: floor)")
        self.curve_prompts, self.max_prompts = curve_prompts, max_prompts
        self.everywhere_prompts, self.effect_prompts = everywhere_prompts, effect_prompts
        self.floor, self.tokens_per_batch = floor, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Patch every residual site of a module; see the module's docstring."""
        kept = self.kept(pair, prompts, self.max_prompts)[0]
        ranking = module.ranking()
        sites = [site for site in map(Site.parse, module.sites) if site.component == "resid_post"]
        controlled = _proposed(sites, ranking)
        curve = {kept.index(p) for p in spread(kept, self.curve_prompts)}
        own = dict(zip(module.sites, map(Site.parse, module.sources), strict=True))
        needed = sorted({s for c in controlled for s in (c, wrong_site(sites, c), own[str(c)])})
        sides = {
            role: Side(
                v.loaded,
                SuffixEngine(v.loaded.model),
                v.shared_ids.to(v.loaded.device),
                [encode(v.tokenizer, p.text) for p in kept],
            )
            for role, v in voices(pair).items()
        }
        if len({side.loaded.width for side in sides.values()}) > 1:
            yield from _unequal(sites)
            return
        read = sorted({*sites, *own.values()})
        for side in sides.values():
            side.read(read, lambda index: read if index in curve else needed)
        openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        first = {}
        for recipient, donor in (("tuned", "base"), ("base", "tuned")):
            patcher = self._patcher(module, sides, recipient, donor, controlled, kept)
            measured = self._measure(kept, patcher, curve, WHERE if self.everywhere_prompts else ("last",))
            first[recipient] = (patcher, measured)
            found = list(self._records(patcher, measured, curve))
            yield from found
            if (recipient, donor) == ("tuned", "base"):
                yield from self._chosen(found, ranking)
            if self.effect_prompts:
                yield from self._effects(kept, patcher, openings, found)
        if "reference" in sides:
            yield from similarities(kept, sides, sorted(curve), sites)
            for recipient in ("tuned", "base"):
                patcher = self._patcher(module, sides, recipient, "reference", [], kept)
                measured = self._measure(kept, patcher, curve, ("last",))
                yield from self._records(patcher, measured, curve, "reference")
                yield from self._nearer(patcher, measured, *first[recipient])

    def _patcher(
        self,
        module: DiffModule,
        sides: Mapping[str, Side],
        recipient: str,
        donor: str,
        controlled: Sequence[Site],
        prompts: Sequence[Prompt],
    ) -> LayerPatcher:
        a, b = sides[recipient], sides[donor]
        (prefix_a, suffix_a), (prefix_b, suffix_b) = (template_tokens(s.loaded.tokenizer) for s in (a, b))
        common = common_template(prefix_a, prefix_b, suffix_a, suffix_b)
        aligned = [align(x, y, *common) for x, y in zip(a.encoded, b.encoded, strict=True)]
        direction: Direction = "into_tuned" if recipient == "tuned" else "into_base"
        names = [p.id for p in prompts]
        return LayerPatcher(
            module, a, b, aligned, direction, self.tokens_per_batch, list(controlled), names, self.seed
        )

    def _measure(
        self, prompts: Sequence[Prompt], patcher: LayerPatcher, curve: set[int], where: Sequence[Where]
    ) -> dict[tuple[Where, Site], Columns]:
        """Run the arms: the curve's prompts at all sites, the others where there are controls."""
        measured: dict[tuple[Where, Site], Columns] = {
            (w, s): defaultdict(dict) for w in where for s in patcher.sites
        }
        for positions, index, site, log_p in self._run(prompts, patcher, curve, where):
            donor, own = patcher.donor.log_p[index], patcher.recipient.log_p[index]
            arms = patcher.arms_at(site, positions)
            nats = [kl_divergence(p.expand_as(log_p), log_p).tolist() for p in (donor, own)]
            for arm, left, moved in zip(arms, *nats, strict=True):
                measured[positions, site][index][arm] = (left, moved)
                about = (str(site), positions, patcher.direction, arm)
                self.items.append(Item(prompts[index].id, "patch_kl_to_donor", *about, left))
        return measured

    def _run(
        self, prompts: Sequence[Prompt], patcher: LayerPatcher, curve: set[int], where: Sequence[Where]
    ) -> Iterator[tuple[Where, int, Site, Tensor]]:
        for index in patcher.patched("last"):
            sites = patcher.sites if index in curve else patcher.controlled
            if sites:
                yield from (("last", index, *found) for found in patcher.last(index, sites))
        if "all" in where:
            able = [prompts[i] for i in patcher.patched("all")]
            for sites, few in ((patcher.sites, [prompts[i] for i in curve]), (patcher.controlled, able)):
                most = spread([p for p in prompts if p in able and p in few], self.everywhere_prompts)
                left = [s for s in sites if sites is patcher.controlled or s not in patcher.controlled]
                chosen = [prompts.index(p) for p in most]
                yield from (("all", *found) for found in patcher.everywhere(chosen, left))

    def _records(
        self,
        patcher: LayerPatcher,
        measured: Mapping[tuple[Where, Site], Columns],
        curve: set[int],
        model: str = "pair",
    ) -> Iterator[Record]:
        """Yield divergence and recovery of every cell, the increments of the curves, and the onsets."""
        for positions in dict.fromkeys(where for where, _ in measured):
            cells = {site: measured[positions, site] for site in patcher.sites}
            about: dict[str, Any] = {
                "question": "rq1",
                "positions": positions,
                "split": "eval",
                "model": model,
                "params": {"direction": patcher.direction},
                "flags": ("unaligned_prompts",) * (len(patcher.patched(positions)) < len(patcher.where)),
            }
            noise = _noise(cells)
            lows: list[float | None] = []
            before: Columns = {}
            for site, cell in cells.items():
                here = {**about, "site": str(site)}
                if not cell:
                    yield missing("patch_recovery", "not_aligned", {**here, "n": 0, "unit": "fraction"})
                    continue
                gap = unpatched(patcher, cell)
                for arm in patcher.arms_at(site, positions):
                    here["control"] = "none" if arm == "raw" else arm
                    left, moved = torch.tensor([c[arm] for c in cell.values()]).double().unbind(1)
                    yield self.mean(moved, "patch_kl", **here, unit="nats")
                    recovered = self.ratio(left, gap, noise, "patch_recovery", **here, unit="fraction")
                    yield recovered
                    if arm == "raw":
                        lows.append(recovered.low)
                on_curve = {i: c for i, c in cell.items() if i in curve and (not before or i in before)}
                gap = unpatched(patcher, on_curve)
                now = to_donor(on_curve)
                then = to_donor({i: before[i] for i in on_curve}) if before else gap
                here["control"] = "none"
                yield self.ratio(gap - then + now, gap, noise, "patch_increment", **here, unit="fraction")
                before = on_curve
            if lows:
                assert len(lows) == len(cells), "a curve has all sites or none"
                yield self._onset(patcher, lows, len(before), about)

    def _onset(
        self, patcher: LayerPatcher, lows: Sequence[float | None], n: int, about: dict[str, Any]
    ) -> Record:
        """Say where the effect enters; every site of the curve has a lower end or none has."""
        about = {**about, "n": n, "unit": "layer", "params": {**about["params"], "floor": self.floor}}
        found = onset(lows, self.floor)
        if found is None:
            nothing = all(low is None for low in lows)
            return missing("patch_onset", "gap_too_small" if nothing else "below_floor", about)
        site = patcher.sites[found]
        return Record(quantity="patch_onset", value=site.layer, **{**about, "site": str(site)})

    def _chosen(self, found: Sequence[Record], ranking: Mapping[str, float]) -> Iterator[Record]:
        """Yield the layers with the most recovery, and those where most of it enters.

        They are flagged if divergence ranks the layers otherwise.
        """
        about: dict[str, Any] = {"split": "eval", "positions": "last"}
        curve = _curve(found, "patch_recovery")
        values = [r.value or 0.0 for r in curve]
        if len(curve) > 1 and all(r.site in ranking for r in curve):
            same = agree([ranking[str(r.site)] for r in curve], values)
            about["flags"] = () if same else ("rankings_disagree",)
        for by in ("patch_recovery", "patch_increment"):
            curve = _curve(found, by)
            for rank, index in enumerate(largest([r.value or 0.0 for r in curve], PROPOSED), 1):
                r = curve[index]
                params = {"by": by, "rank": rank, "share": round(r.value or 0.0, 4)}
                layer = Site.parse(str(r.site)).layer
                yield Record("rq1", "chosen_layer", layer, r.n, "layer", params=params, site=r.site, **about)

    def _effects(
        self,
        prompts: Sequence[Prompt],
        patcher: LayerPatcher,
        openings: Mapping[str, Openings],
        found: Sequence[Record],
    ) -> Iterator[Record]:
        """Yield what patches do to graded behaviour, by class of prompts.

        They are those with controls, and beside them the patch where the effect enters.
        """
        entered = [Site.parse(str(r.site)) for r in found if r.quantity == "patch_onset" and r.site]
        where = [w for w in WHERE if any(r.positions == w for r in found)]
        changes: dict[tuple[Site, Where, str, str, str], list[float]] = defaultdict(list)
        for e in effects(prompts, patcher, openings, entered, where, self.effect_prompts):
            changes[e.site, e.positions, e.metric, e.prompt.label, e.arm].append(e.change)
            about = (str(e.site), e.positions, patcher.direction, f"{e.arm}:{e.metric}")
            self.items.append(Item(e.prompt.id, "patch_effect", *about, e.change))
        for (site, positions, metric, label, arm), values in sorted(changes.items()):
            yield self.mean(
                torch.tensor(values),
                "patch_effect",
                question="rq1",
                site=str(site),
                positions=positions,
                split="eval",
                unit="nats",
                control="none" if arm == "raw" else arm,
                params={"direction": patcher.direction, "label": label, "metric": metric},
            )

    def _nearer(
        self,
        patcher: LayerPatcher,
        measured: Mapping[tuple[Where, Site], Columns],
        other: LayerPatcher,
        before: Mapping[tuple[Where, Site], Columns],
    ) -> Iterator[Record]:
        """Yield by how much recovery towards the pair's other model exceeds that towards the reference."""
        for site in patcher.sites:
            cells = (before["last", site], measured["last", site])
            both = sorted(cells[0].keys() & cells[1].keys())
            donor = "base" if patcher.direction == "into_tuned" else "tuned"
            about: dict[str, Any] = {
                "question": "rq1",
                "site": str(site),
                "positions": "last",
                "split": "eval",
                "unit": "fraction",
                "model": "reference",
                "params": {"direction": patcher.direction, "contrast": f"{donor} minus reference"},
            }
            columns = [
                torch.stack([to_donor({i: cell[i] for i in both}), unpatched(p, both)], 1)
                for p, cell in zip((other, patcher), cells, strict=True)
                if both
            ]
            if not both or not all(self.gap(c[:, 1], _noise(before), about) for c in columns):
                reason = "gap_too_small" if both else "not_aligned"
                yield missing("patch_recovery", reason, {**about, "n": len(both)})
                continue
            to_other, to_reference = columns
            yield nearer(to_other, to_reference, about, self._generator("patch_recovery", about))


def _proposed(sites: Sequence[Site], ranking: Mapping[str, float]) -> list[Site]:
    """Return the sites where models differ most, in order of depth; all if nothing has ranked them."""
    ranked = [site for site in sites if str(site) in ranking]
    best = largest([ranking[str(site)] for site in ranked], PROPOSED)
    return sorted(ranked[i] for i in best) or list(sites)


def _unequal(sites: Sequence[Site]) -> Iterator[Record]:
    about: dict[str, Any] = {"question": "rq1", "n": 0, "unit": "fraction", "split": "eval"}
    for site in sites:
        yield missing("patch_recovery", "unequal_widths", {**about, "site": str(site)})


def _noise(cells: Mapping[Any, Columns]) -> float:
    """Return the largest mean that putting a state back moves the recipient by, in nats."""
    moved = [[arms["self"][1] for arms in cell.values() if "self" in arms] for cell in cells.values()]
    return max((sum(values) / len(values) for values in moved if values), default=0.0)


def _curve(found: Iterable[Record], quantity: str) -> list[Record]:
    """Return the points of a curve over layers at the last position that have a value."""
    wanted = (quantity, "last", "none")
    return [r for r in found if (r.quantity, r.positions, r.control) == wanted and r.value is not None]
