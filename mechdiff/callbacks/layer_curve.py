"""What is read from a curve over layers: where the effect of a patch enters, and which layers to probe.

1. Onset: the first site at which a patch restores the donor, or moves the recipient at all, by more than a
   floor for certain; both are shares of the divergence of the two models. Below the first difference in the
   weights both are 0, for the states are the same.
2. Recovery alone does not do. Where parts of a difference cancel, undoing the first of them restores nothing:
   of three heads with their signs flipped, the patch at the first restored −9 % [−49, 25] and moved 56 %, and
   recovery began to count seven layers above (`docs/calibration.md`). Moving alone does not do either: it
   grows with the square of a small part, recovery in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mechdiff.functional.selection import PROPOSED, agree, largest, onset
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import missing
from mechdiff.results import DISAGREE, Record

CURVES = ("patch_recovery", "patch_increment")


def is_curve(r: Record, positions: str, quantity: str = "patch_recovery") -> bool:
    """Say whether a record is a point of a curve over layers, all of which rest on the same prompts."""
    own = r.params.get("prompts", "curve") == "curve" and "contrast" not in r.params
    return (r.quantity, r.positions, r.control) == (quantity, positions, "none") and own


def entry(curve: Sequence[Record], moves: Sequence[Record], floor: float, about: Mapping[str, Any]) -> Record:
    """Say where an effect enters; every site of the curve has a lower end or none has.

    Args:
        curve: Recovery at each site, in order of the layers.
        moves: How far each moves the recipient, as a share of the divergence.
        floor: Share that counts as an effect.
        about: The other attributes of the record.
    """
    ends = [[r.low for r in pair if r.low is not None] for pair in zip(curve, moves, strict=True)]
    found = onset([max(lows, default=None) for lows in ends], floor)
    about = {
        **about,
        "unit": "layer",
        "n": curve[found or 0].n,
        "params": {**about["params"], "floor": floor},
    }
    if found is None:
        nothing = all(r.low is None for r in curve)
        return missing("patch_onset", "gap_too_small" if nothing else "below_floor", about)
    site = Site.parse(str(curve[found].site))
    return Record(quantity="patch_onset", value=site.layer, site=str(site), **about)


def chosen(found: Sequence[Record], ranking: Mapping[str, float], floor: float) -> Iterator[Record]:
    """Yield the layers with the most recovery, and those where most of it enters.

    They are flagged if divergence ranks the layers otherwise or proposes one at which a patch does nothing,
    and if they saw what is reported on.

    Args:
        found: Records of one direction, with its curves at the last position.
        ranking: How much the models differ at each site, where that is known.
        floor: Recovery that counts as an effect, a fraction.
    """
    curves = {by: [r for r in found if is_curve(r, "last", by) and r.value is not None] for by in CURVES}
    flags: tuple[str, ...] = ()
    recovered = curves["patch_recovery"]
    if len(recovered) > 1 and all(r.site in ranking for r in recovered):
        apart = [ranking[str(r.site)] for r in recovered]
        same = agree(apart, [r.value or 0.0 for r in recovered])
        lows = [recovered[i].low for i in largest(apart, PROPOSED)]
        causal = all(low is not None and low > floor for low in lows)
        flags = () if same and causal else (DISAGREE,)
    for by, curve in curves.items():
        for rank, index in enumerate(largest([r.value or 0.0 for r in curve], PROPOSED), 1):
            r = curve[index]
            about: dict[str, Any] = {"site": r.site, "positions": "last", "split": r.split}
            about["params"] = {"by": by, "rank": rank, "share": round(r.value or 0.0, 4)}
            about["flags"] = (*flags, *(("chosen_on_eval",) if r.split == "eval" else ()))
            yield Record("rq1", "chosen_layer", Site.parse(str(r.site)).layer, r.n, "layer", **about)
