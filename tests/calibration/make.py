"""A calibration as a run would write it, with numbers from a formula."""

from __future__ import annotations

import math

from mechdiff.calibration.cells import Cell

PROMPTS = (12, 24, 40, 80, 160)
STRENGTHS = (0.25, 0.5, 1.0, 2.0)


def calibration(trials: int = 200) -> list[Cell]:
    """Return cells of every group: power rises with strength and prompts."""
    found = []
    for n in PROMPTS:
        for strength in STRENGTHS:
            share = 0.5 * (1 + math.erf((strength * math.sqrt(n) - 3) / math.sqrt(2)))
            about = {"question": "rq4", "quantity": "power", "method": "own change", "kind": "flipped"}
            count = round(trials * share)
            found.append(Cell.count(count, trials, strength=strength, prompts=n, **about))
        about = {"question": "intervals", "quantity": "coverage", "strength": None, "prompts": n}
        for method, lost in (("mean of a gap", 0.3), ("recovery (ratio of sums)", 1.2)):
            held = round(trials * (0.95 - lost / n))
            for kind in ("prompts", "families"):
                found.append(Cell.count(held, trials, method=method, kind=kind, target=(0.93, 0.97), **about))
    for strength in STRENGTHS:
        for method, low in (("patch", 0.3), ("graft", 0.6)):
            count = round(trials * (1 - low * math.exp(-3 * strength)))
            about = {
                "question": "rq1",
                "quantity": "onset_within_one",
                "method": method,
                "kind": "policy r=1",
            }
            found.append(Cell.count(count, trials, strength=strength, prompts=40, target=0.95, **about))
    about = {
        "question": "rq4",
        "quantity": "false_positives",
        "strength": None,
        "prompts": 40,
        "target": 0.05,
    }
    found.append(Cell.count(8, trials, method="max test", kind="copy", **about))
    found.append(Cell.count(13, trials, method="max test", kind="labels swapped", **about))
    note = "Every difference counts with enough prompts."
    found.append(Cell.count(60, trials, method="|z| > 2", kind="labels swapped", note=note, **about))
    return found
