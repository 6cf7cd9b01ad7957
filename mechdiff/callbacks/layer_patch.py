"""LayerPatch: at which layer does one model's state make the other behave like it?

1. The donor's residual replaces the recipient's at one site, in both directions, at the last position before
   the answer and at all aligned positions.
2. Recovery = 1 − mean KL(P_donor ‖ P_patched) / mean KL(P_donor ‖ P_recipient): 1 makes the recipient the
   donor; breaking a model cannot mimic it. Beside it how far the patch moves the recipient,
   KL(P_recipient ‖ P_patched), and what it does to the log-odds of refusing and to log P(correct).
3. The curve over all sites, and what is chosen from it, is read on the same dev prompts at every site
   (``prompts: curve``); on eval prompts if there are no others, and then flagged ``chosen_on_eval``. Eval
   prompts and the controls of `mechdiff.callbacks.layer_patcher` are run at the layers that the divergence
   proposes, and where most of the curve enters (``prompts: all``).
4. Patching above a change undoes it at every later layer, so increments of the curve stand beside it, and
   `patch_onset`: the first site at which a patch acts for certain (`mechdiff.callbacks.layer_curve`). If the
   order of layers by recovery is not that by divergence, the chosen layers are flagged.
5. Where the pair names a third model, its states are compared and patched in as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.graded import Openings, read_openings
from mechdiff.callbacks.layer_curve import chosen, entry, is_curve
from mechdiff.callbacks.layer_effects import effects
from mechdiff.callbacks.layer_patcher import Columns, LayerPatcher, moved_by, to_donor, unpatched, wrong_site
from mechdiff.callbacks.patcher import Direction, Side, Where
from mechdiff.callbacks.third_model import nearer, similarities
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.selection import ONSET_FLOOR, PROPOSED, largest
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.voice import voices
from mechdiff.results import Record

WHERE: tuple[Where, ...] = get_args(Where)
Measured = Mapping[tuple[Where, Site], Columns]


class LayerPatch(CausalEvaluation):
    """Patches the states of one model into the other, layer by layer.

    Args:
        curve_prompts: Dev prompts of the curve over layers, evenly over languages and classes.
        max_prompts: Evaluation prompts at the proposed layers; None takes all.
        everywhere_prompts: The same where all positions are patched, which costs as many tokens; 0 leaves
            these patches out.
        effect_prompts: Evaluation prompts whose log-odds of refusing and log P(correct) are read, the
            costliest part; 0 leaves it out.
        floor: Share of the divergence that counts as an effect, restored or moved by.
        tokens_per_batch: Tokens run at once when all positions are patched.

    Raises:
        ConfigError: If there are too few prompts of a kind, or the floor is not between 0 and 1.
    """

    splits: ClassVar[tuple[str, ...]] = ("dev", "eval")

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
        counts = {"max_prompts": (max_prompts, 1), "curve_prompts": (curve_prompts, 1)}
        counts |= {"everywhere_prompts": (everywhere_prompts, 0), "effect_prompts": (effect_prompts, 0)}
        for name, (count, least) in counts.items():
            if count is not None and count < least:
                raise ConfigError(f"{name} is {count}; allowed: {least} or more (key: {name})")
        if not 0 <= floor < 1:
            raise ConfigError(f"floor is {floor}; allowed: from 0 to below 1 (key: floor)")
        self.curve_prompts, self.max_prompts = curve_prompts, max_prompts
        self.everywhere_prompts, self.effect_prompts = everywhere_prompts, effect_prompts
        self.floor, self.tokens_per_batch = floor, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Patch every residual site of a module; see the module's docstring."""
        held = [p for p in prompts if p.split == "eval"]
        if not held:
            raise PromptError("no prompt has split eval (key: pair.prompts)")
        few = self.kept(pair, [p for p in prompts if p.split == "dev"] or held, self.curve_prompts)[0]
        kept = self.kept(pair, held, self.max_prompts)[0]
        ranking, sites = module.ranking(), _residual(module)
        if len({v.loaded.width for v in voices(pair).values()}) > 1:
            yield from _unequal(sites)
            return
        curve = list(self._curve(module, pair, few, ranking))
        yield from curve
        enters = [Site.parse(str(r.site)) for r in curve if r.params.get("by") == "patch_increment"]
        onsets = [r for r in curve if r.quantity == "patch_onset" and r.site and r.model == "pair"]
        controlled = sorted({*_proposed(sites, ranking), *enters})
        yield from self._controlled(module, pair, kept, controlled, onsets)
        # Where there are no dev prompts, one may be in both parts.
        self.items = list({replace(item, value=0.0): item for item in self.items}.values())

    def _curve(
        self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt], ranking: Mapping[str, float]
    ) -> Iterator[Record]:
        """Patch every site on the prompts of the curve, choose layers, and compare with a third model."""
        sites = _residual(module)
        sides = _sides(pair, prompts, sorted({*sites, *map(Site.parse, module.sources)}))
        where = WHERE if self.everywhere_prompts else WHERE[:1]
        first = {}
        for recipient, donor in (("tuned", "base"), ("base", "tuned")):
            patcher = self._patcher(module, sides, recipient, donor, [], prompts)
            measured = self._measure(prompts, patcher, sites, where)
            first[recipient] = (patcher, measured)
            found = list(self._records(patcher, measured, prompts[0].split, "curve"))
            found += self._along(patcher, measured, found)
            yield from found
            if recipient == "tuned":
                yield from chosen(found, ranking, self.floor)
        if "reference" in sides:
            yield from similarities(prompts, sides, range(len(prompts)), sites)
            for recipient in ("tuned", "base"):
                patcher = self._patcher(module, sides, recipient, "reference", [], prompts)
                measured = self._measure(prompts, patcher, sites, WHERE[:1])
                found = list(self._records(patcher, measured, prompts[0].split, "curve", "reference"))
                yield from (*found, *self._along(patcher, measured, found))
                yield from self._nearer(patcher, measured, *first[recipient], prompts[0].split)

    def _controlled(
        self,
        module: DiffModule,
        pair: LoadedPair,
        prompts: Sequence[Prompt],
        controlled: Sequence[Site],
        onsets: Sequence[Record],
    ) -> Iterator[Record]:
        """Patch chosen sites on all prompts with controls, and read graded behaviour."""
        own = dict(zip(map(Site.parse, module.sites), map(Site.parse, module.sources), strict=True))
        needed = {*controlled, *(Site.parse(str(r.site)) for r in onsets)}
        needed |= {wrong_site(_residual(module), site) for site in controlled}
        sides = _sides(pair, prompts, sorted(needed | {own[site] for site in needed}))
        openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        where = WHERE if self.everywhere_prompts else WHERE[:1]
        for recipient, donor in (("tuned", "base"), ("base", "tuned")):
            patcher = self._patcher(module, sides, recipient, donor, controlled, prompts)
            measured = self._measure(prompts, patcher, controlled, where)
            yield from self._records(patcher, measured, "eval", "all")
            entered = [Site.parse(str(r.site)) for r in onsets if r.params["direction"] == patcher.direction]
            if self.effect_prompts:
                yield from self._effects(prompts, patcher, openings, entered, where)

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
        about = (list(controlled), [p.id for p in prompts], self.seed)
        return LayerPatcher(module, a, b, aligned, direction, self.tokens_per_batch, *about)

    def _measure(
        self, prompts: Sequence[Prompt], patcher: LayerPatcher, sites: Sequence[Site], where: Sequence[Where]
    ) -> Measured:
        """Run the arms at some sites."""
        measured: Measured = {(w, s): defaultdict(dict) for w in where for s in sites}
        for positions, index, site, log_p in self._run(prompts, patcher, sites, where):
            donor, own = patcher.donor.log_p[index], patcher.recipient.log_p[index]
            arms = patcher.arms_at(site, positions)
            nats = [kl_divergence(p.expand_as(log_p), log_p).tolist() for p in (donor, own)]
            for arm, left, moved in zip(arms, *nats, strict=True):
                measured[positions, site][index][arm] = (left, moved)
                about = (str(site), positions, patcher.direction, arm)
                self.items.append(Item(prompts[index].id, "patch_kl_to_donor", *about, left))
        return measured

    def _run(
        self, prompts: Sequence[Prompt], patcher: LayerPatcher, sites: Sequence[Site], where: Sequence[Where]
    ) -> Iterator[tuple[Where, int, Site, Tensor]]:
        for index in patcher.patched("last"):
            yield from (("last", index, *found) for found in patcher.last(index, sites))
        if "all" in where:
            most = spread([prompts[i] for i in patcher.patched("all")], self.everywhere_prompts)
            few = [prompts.index(p) for p in most]
            yield from (("all", *found) for found in patcher.everywhere(few, sites))

    def _records(
        self, patcher: LayerPatcher, measured: Measured, split: str, prompts: str, model: str = "pair"
    ) -> Iterator[Record]:
        """Yield divergence and recovery of every cell."""
        noise = _noise(measured)
        for (positions, site), cell in measured.items():
            here = {**_about(patcher, positions, split, model), "site": str(site)}
            here["params"] = {**here["params"], "prompts": prompts}
            if not cell:
                yield missing("patch_recovery", "not_aligned", {**here, "n": 0, "unit": "fraction"})
                continue
            gap = unpatched(patcher, cell)
            for arm in patcher.arms_at(site, positions):
                here["control"] = "none" if arm == "raw" else arm
                left, moved = torch.tensor([c[arm] for c in cell.values()]).double().unbind(1)
                yield self.mean(moved, "patch_kl", **here, unit="nats")
                yield self.ratio(left, gap, noise, "patch_recovery", **here, unit="fraction")

    def _along(self, patcher: LayerPatcher, measured: Measured, found: Sequence[Record]) -> Iterator[Record]:
        """Yield the increments of the curves, and the onsets."""
        noise = _noise(measured)
        for positions in dict.fromkeys(where for where, _ in measured):
            curve = [r for r in found if is_curve(r, positions) and r.n]
            before: Columns = {}
            moves: list[Record] = []
            for r in curve:
                cell = measured[positions, Site.parse(str(r.site))]
                assert not before or cell.keys() == before.keys(), "a curve has the same prompts at all sites"
                gap = unpatched(patcher, cell)
                left = gap - (to_donor(before) if before else gap) + to_donor(cell)
                stays = gap - moved_by(cell)
                about = {**_about(patcher, positions, str(r.split), r.model), "site": r.site}
                yield self.ratio(left, gap, noise, "patch_increment", **about, unit="fraction")
                moves.append(self.ratio(stays, gap, noise, "patch_kl", **about, unit="fraction"))
                before = cell
            if curve:
                about = _about(patcher, positions, str(curve[0].split), curve[0].model)
                yield entry(curve, moves, self.floor, about)

    def _effects(
        self,
        prompts: Sequence[Prompt],
        patcher: LayerPatcher,
        openings: Mapping[str, Openings],
        entered: Sequence[Site],
        where: Sequence[Where],
    ) -> Iterator[Record]:
        """Yield what patches do to graded behaviour, by class of prompts.

        They are those with controls, and beside them the patch where the effect enters.
        """
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
        measured: Measured,
        other: LayerPatcher,
        before: Measured,
        split: str,
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
                "split": split,
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


def _residual(module: DiffModule) -> list[Site]:
    return [site for site in map(Site.parse, module.sites) if site.component == "resid_post"]


def _proposed(sites: Sequence[Site], ranking: Mapping[str, float]) -> list[Site]:
    """Return the sites where models differ most, in order of depth; all if nothing has ranked them."""
    ranked = [site for site in sites if str(site) in ranking]
    best = largest([ranking[str(site)] for site in ranked], PROPOSED)
    return sorted(ranked[i] for i in best) or list(sites)


def _unequal(sites: Sequence[Site]) -> Iterator[Record]:
    about: dict[str, Any] = {"question": "rq1", "n": 0, "unit": "fraction", "split": "eval"}
    for site in sites:
        yield missing("patch_recovery", "unequal_widths", {**about, "site": str(site)})


def _noise(measured: Measured) -> float:
    """Return the largest mean that putting a state back moves the recipient by, in nats."""
    moved = [[arms["self"][1] for arms in cell.values() if "self" in arms] for cell in measured.values()]
    return max((sum(values) / len(values) for values in moved if values), default=0.0)


def _about(patcher: LayerPatcher, positions: Where, split: str, model: str) -> dict[str, Any]:
    lost = len(patcher.patched(positions)) < len(patcher.where)
    return {
        "question": "rq1",
        "positions": positions,
        "split": split,
        "model": model,
        "params": {"direction": patcher.direction},
        "flags": ("unaligned_prompts",) * lost,
    }


def _sides(pair: LoadedPair, prompts: Sequence[Prompt], sites: Sequence[Site]) -> dict[str, Side]:
    """Let every model read the prompts and keep its states at some sites."""
    sides = {}
    for role, v in voices(pair).items():
        encoded = [encode(v.tokenizer, p.text) for p in prompts]
        engine = SuffixEngine(v.loaded.model)
        sides[role] = Side(v.loaded, engine, v.shared_ids.to(v.loaded.device), encoded)
        sides[role].read(sites)
    return sides
