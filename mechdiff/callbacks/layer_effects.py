"""What layer patches do to graded behaviour: the log-odds of refusing, and log P(correct).

The prompt is patched at one site, at its last position or at all aligned ones; what may follow is then read
as it is. The change is that from the recipient's own reading of the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mechdiff.callbacks.graded import Openings, grades
from mechdiff.callbacks.layer_patcher import LayerPatcher
from mechdiff.callbacks.patcher import Where
from mechdiff.data.prompts import Prompt, spread
from mechdiff.interventions.sites import Site


class Effect(NamedTuple):
    """What one patch changes after one prompt, in nats."""

    prompt: Prompt
    metric: str
    site: Site
    arm: str
    positions: Where
    change: float


def effects(
    prompts: Sequence[Prompt],
    patcher: LayerPatcher,
    openings: Mapping[str, Openings],
    entered: Iterable[Site],
    where: Sequence[Where],
    most: int,
) -> Iterator[Effect]:
    """Patch prompts that can be: the arms where there are controls, and the donor's elsewhere.

    Args:
        prompts: What the patcher's sides have read.
        patcher: Runs the arms.
        openings: Refusing and complying openings by language.
        entered: Sites that are patched without controls, where an effect enters.
        where: Positions that are patched, in turn.
        most: How many prompts, evenly over languages and classes.
    """
    arms = [(site, arm) for site in patcher.controlled for arm in patcher.arms_at(site, "last")]
    arms += [(site, "raw") for site in sorted(set(entered) - set(patcher.controlled))]
    where = [w for w in where if patcher.patched(w)]
    cells = [(site, arm, w) for w in where for site, arm in arms if arm != "self"]
    able = [
        p
        for i, p in enumerate(prompts)
        if grades(p, openings) and all(i in patcher.patched(w) for w in where)
    ]
    for p in spread(able, most):
        for graded in grades(p, openings):
            clean, nats = patcher.readings(prompts.index(p), graded, cells)
            for cell in cells:
                yield Effect(p, graded.metric, *cell, nats[cell] - clean)
