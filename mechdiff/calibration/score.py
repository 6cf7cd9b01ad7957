"""Judge the raw results of a calibration: a pure function from lines to a table.

1. A line gives successes and trials of several quantities: of recall, whether the planted place, rank,
   subspace or head was found; of power, whether the question says that there is anything; on nulls, the same
   is a false positive.
2. Cells count them by kind, strength and number of prompts. Beside them, without a strength, stand all cases
   of a kind whose gap is at least `CLEAR_NATS`: the clearly measurable ones, to which the targets apply.
   Nulls have no strength. `any planted` and `any null` count them over kinds, `any planted in one place` and
   `in several places` over those whose difference enters at one block or not.
3. Of a difference in several blocks, those are to be found that matter: each by itself moves a model by
   `ONSET_FLOOR` of the gap or more, the share below which the methods themselves call nothing an effect. A
   head matters if its block does. The first of these blocks is the true onset. Of a ranking by graft no more
   heads are judged than were grafted.
4. Churn is a share of heads, so its false positives are counted in heads; whether any head at all lies beyond
   the floor stands beside it, and is what `churn_p` is for.
5. Intervals are exact binomial ones. Heads of one case are counted as if they were independent.
6. What is not a share (angles, gaps, ranks) is kept as a median with quartiles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mechdiff.calibration.cases import CLEAR_NATS, GRAFTED, NULLS
from mechdiff.calibration.cells import Calibration, Cell
from mechdiff.functional.selection import ONSET_FLOOR, largest, onset

Line = Mapping[str, Any]
CLOSE_DEGREES = 5.0
"""Largest principal angle of a subspace that was found."""
TARGETS = {
    "onset_within_one": 0.95,
    "k_error_zero": 0.9,
    "heads_first": 0.95,
    "false_positives": 0.05,
}
"""What is wanted of clearly measurable cases, at least; of false positives, at most."""
AIMED = {
    "onset_within_one": ("patch", "graft"),
    "heads_first": ("own_change", "graft"),
    "k_error_zero": ("paired_svd",),
}
"""Methods that a target applies to, where it is not all of them: other rankings and bases are there to be
compared with, and no study is told to rely on them."""
ANY = "any head: "
"""Begins what a method says of all heads together, where its claim is a share of them."""
WHY = {
    ("onset_within_one", "patch"): "A patch at the last position undoes what has reached that position. Of a "
    "difference in several blocks the first may act through other tokens, or act against the others.",
    ("onset_within_one", "graft"): "Of a block that does a tenth or a fifth of the difference the interval "
    "over so few prompts reaches below the floor of 5 %, and where parts cancel its graft restores nothing.",
}
"""Why a target is missed, as far as it is known, by quantity and method."""
ANY_PLANTED = "any planted"
ONE_PLACE = ("policy", "block", "relay")
"""Families whose difference enters at one block; that of others is in several, which may cancel."""
PROPOSE = ("divergence", "r2_delta")
"""Methods that say where or how models differ, however little; whether they do is for others to say."""


class Count(NamedTuple):
    """What one line says of one quantity."""

    question: str
    quantity: str
    method: str
    successes: int
    trials: int = 1


class Number(NamedTuple):
    """A number of one line that is no share."""

    question: str
    quantity: str
    method: str
    value: float
    unit: str


def table(lines: Sequence[Line]) -> Calibration:
    """Return the cells and the numbers of all lines, in a fixed order.

    Args:
        lines: Raw results, in any order.
    """
    counts: dict[tuple[Any, ...], list[Count]] = defaultdict(list)
    numbers: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for line in lines:
        for name, strength, prompts in _places(line):
            apart = name.startswith(f"{ANY_PLANTED} in")  # other questions are asked of one of the two alone
            for count in judge(line):
                if count.question == "rq1" or not apart:
                    counts[(*count[:3], name, strength, prompts)].append(count)
            for number in numbers_of(line):
                if number.question == "rq1" or not apart:
                    numbers[(*number[:3], number.unit, name, strength, prompts)].append(number.value)
    return Calibration(
        [_cell(key, counts[key]) for key in sorted(counts, key=_order)],
        numbers=[_summary(key, numbers[key]) for key in sorted(numbers, key=_order)],
    )


def judge(line: Line) -> Iterator[Count]:
    """Yield what a line counts for."""
    found, truth, null = line["found"], line["truth"], line["kind"] in NULLS
    quantity = "false_positives" if null else "power"
    if "readings" in found.get("rq4", {}):
        rq4 = found["rq4"]
        for method in ("passed_max", "passed_bh", "above_floor"):
            yield Count("rq4", quantity, METHODS[method], rq4[method], rq4["readings"])
        yield Count("rq4", quantity, CHURN, rq4["heads_above"], rq4["readings"] * rq4["heads"])
        return
    for question, method, fired in _fired(found):
        yield Count(question, quantity, method, int(fired))
    if null:
        if "rq4" in found:
            rq4 = found["rq4"]
            for floor, share in rq4["churn"].items():
                yield Count("rq4", quantity, f"churn_{floor}", round(share * rq4["heads"]), rq4["heads"])
        return
    matter = mattering(line)
    if "rq1" in found:
        yield from _places_found(found["rq1"], truth["layers"], matter, line["kind"] == "relay")
    if "rq3" in found:
        yield from _rank_found(found["rq3"], truth["rank"])
    if "rq4" in found:
        yield from _heads_found(found["rq4"], truth["heads"], matter)


def mattering(line: Line) -> list[int]:
    """Return the planted blocks that matter, ascending; the one that does most, if none is large enough."""
    truth = line["truth"]
    layers, moved = truth["layers"], truth.get("parts")
    if moved is None:  # one block is all there is
        return list(layers)
    least = min(ONSET_FLOOR * (gap_of(line) or 0.0), max(moved))
    return [layer for layer, nats in zip(layers, moved, strict=True) if nats >= least]


def numbers_of(line: Line) -> Iterator[Number]:
    """Yield the numbers of a line that are no shares."""
    found = line["found"]
    if gap := gap_of(line):
        yield Number("rq1", "gap", "none", gap, "nats")
    if "rq3" in found:
        for solver, angles in found["rq3"]["angles"].items():
            yield Number("rq3", "principal_angle", solver, max(angles), "degrees")
        for solver, k in found["rq3"]["k"].items():
            if k["value"] is not None:
                yield Number("rq3", "minimal_k_90", solver, k["value"], "directions")


def gap_of(line: Line) -> float | None:
    """Return the mean divergence of tuned from base, nats; None where nobody asked."""
    if "rq1" not in line["found"]:
        return None
    value = line["found"]["rq1"]["graft"]["base_into_tuned"]["gap"][0]
    return None if value is None else float(value)


CHURN = "churn_label_swap"
METHODS = {"passed_max": "churn_p", "passed_bh": "churn_bh", "above_floor": ANY + CHURN}
"""What the tests of heads are called."""


def _fired(found: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield, by question and method, whether it says that the models differ."""
    if "rq1" in found:
        rq1 = found["rq1"]
        yield "rq1", "patch", any(side["onset"] is not None for side in rq1["patch"].values())
        yield "rq1", "graft", any(_entry(side) is not None for side in rq1["graft"].values())
        yield "rq1", "divergence", any("gap_too_small" not in p["flags"] for p in rq1["divergence"])
    if "rq2" in found:
        for quantity in ("r2_delta", "kl_reduction", "patch_agreement"):
            yield "rq2", quantity, _positive(found["rq2"][quantity])
    if "rq3" in found:
        for solver, k in found["rq3"]["k"].items():
            yield "rq3", solver, k["value"] is not None
    if "rq4" in found:
        rq4 = found["rq4"]
        yield "rq4", "churn_p", bool(rq4["passed_max"])
        yield "rq4", "churn_bh", bool(rq4["passed_bh"])
        for floor, share in rq4["churn"].items():
            yield "rq4", f"{ANY}churn_{floor}", bool(share)
        yield "rq4", "graft", rq4["graft_low"] is not None and rq4["graft_low"] > ONSET_FLOOR


def _places_found(
    rq1: Mapping[str, Any], layers: Sequence[int], matter: Sequence[int], relay: bool
) -> Iterator[Count]:
    """Judge where an effect enters, and which blocks hold it."""
    entered = {
        "patch": rq1["patch"]["into_tuned"]["onset"],
        "graft": _entry(rq1["graft"]["base_into_tuned"]),
        "divergence": rq1["divergence"][0]["layer"] if rq1["divergence"] else None,
    }
    for method, layer in entered.items():
        yield from _near("onset", method, layer, matter[0])
    if relay:  # tuned's state makes base act only from where it has been read
        yield from _near("read", "patch", rq1["patch"]["into_base"]["onset"], layers[-1])
    ranked = {
        "patch": rq1["patch"]["into_tuned"]["increment"],
        "graft": [ends[0] for ends in rq1["graft"]["base_into_tuned"]["recovery"]],
    }
    for method, values in ranked.items():
        known = [float("-inf") if value is None else value for value in values]
        best = set(largest(known, len(matter))) if any(value is not None for value in values) else set()
        yield Count("rq1", "block_recall", method, len(best & set(matter)), len(matter))


def _near(quantity: str, method: str, layer: int | None, true: int) -> Iterator[Count]:
    yield Count("rq1", f"{quantity}_exact", method, int(layer == true))
    yield Count("rq1", f"{quantity}_within_one", method, int(layer is not None and abs(layer - true) <= 1))


def _rank_found(rq3: Mapping[str, Any], rank: int) -> Iterator[Count]:
    for solver, k in rq3["k"].items():
        yield Count("rq3", "k_error_zero", solver, int(k["value"] == rank))
    for solver, angles in rq3["angles"].items():
        if len(angles) == rank:
            yield Count("rq3", "principal_angle", solver, int(max(angles) <= CLOSE_DEGREES))


def _heads_found(
    rq4: Mapping[str, Any], heads: Sequence[Sequence[int]], matter: Sequence[int]
) -> Iterator[Count]:
    """Judge rankings of heads: no other head may stand above as many planted ones as matter."""
    planted = {tuple(head) for head in heads}
    true = {head for head in planted if head[0] in matter}
    for method in ("own_change", "attribution", "graft"):
        ranked = [(int(layer), int(head)) for layer, head, _ in rq4[method]]
        found = set(ranked[: len(planted)]) & true
        yield Count("rq4", "head_recall", method, len(found), len(true))
        most = min(len(true), GRAFTED) if method == "graft" else len(true)  # no more planted ones are grafted
        first = ranked[:most]
        yield Count("rq4", "heads_first", method, int(len(first) == most and set(first) <= planted))
    passed = {tuple(head) for head in rq4["passed_max"]}
    yield Count("rq4", "head_recall", "churn_p", len(passed & true), len(true))
    if passed:
        yield Count("rq4", "head_precision", "churn_p", len(passed & planted), len(passed))


def _entry(side: Mapping[str, Any]) -> int | None:
    """Return the first block whose graft recovers more than the floor for certain."""
    return onset([ends[1] for ends in side["recovery"]])


def _positive(answer: Mapping[str, Any]) -> bool:
    return answer["low"] is not None and answer["low"] > 0


def _places(line: Line) -> Iterator[tuple[str, float | None, int]]:
    """Yield the cells that a line counts in: kind, strength or None, and number of prompts."""
    kind, prompts = line["kind"], line["prompts"]
    if kind in NULLS:
        yield kind, None, prompts
        yield "any null", None, prompts
        return
    gap = gap_of(line)
    clear = gap is not None and gap >= CLEAR_NATS
    family = kind.partition("_")[0]
    for name in dict.fromkeys((kind, family)):
        yield name, line["strength"], prompts
        if clear:
            yield name, None, prompts
    if clear:
        yield ANY_PLANTED, None, prompts
        where = "one place" if family in ONE_PLACE else "several places"
        yield f"{ANY_PLANTED} in {where}", None, prompts


def _cell(key: tuple[Any, ...], counts: Sequence[Count]) -> Cell:
    question, quantity, method, kind, strength, prompts = key
    successes, trials = (sum(getattr(count, part) for count in counts) for part in ("successes", "trials"))
    aimed = method not in PROPOSE and not method.startswith(ANY) and method in AIMED.get(quantity, (method,))
    applies = strength is None and aimed
    about = {"question": question, "quantity": quantity, "method": method, "kind": kind}
    about |= {"strength": strength, "prompts": prompts, "target": TARGETS.get(quantity) if applies else None}
    return Cell.count(successes, trials, **about, note=WHY.get((quantity, method)))


def _summary(key: tuple[Any, ...], values: Sequence[float]) -> dict[str, Any]:
    question, quantity, method, unit, kind, strength, prompts = key
    ends = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(ends).tolist()
    return {
        "question": question,
        "quantity": quantity,
        "method": method,
        "kind": kind,
        "strength": strength,
        "prompts": prompts,
        "n": len(values),
        "median": middle,
        "quartiles": [low, high],
        "unit": unit,
    }


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put what is over all strengths first."""
    return tuple((part is not None, part if part is not None else 0) for part in key)
