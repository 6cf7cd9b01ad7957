"""Turn what single prompts show into records: for each model, and for each two models on the same prompts.

1. A cell is a quantity with its parameters. Its value is Σ value / Σ weight over prompts: a mean where every
   weight is 1, else a rate (bits per byte, markers per 100 words).
2. Shares of yes and no get an exact binomial interval, everything else a bootstrap over prompts.
3. A difference is taken over the prompts that both models have a value for. Of shares it gets an interval for
   paired proportions, else it is resampled by prompt.
4. What could not be measured is counted: it is missing from `n`, and the reason becomes a flag, or the
   record's reason if nothing is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechdiff.functional.paired import paired_difference
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import bootstrap_sums, generator
from mechdiff.modules.base import estimated
from mechdiff.results import Record

Cell = tuple[str, str, tuple[tuple[str, Any], ...]]  # quantity, control, parameters


@dataclass(frozen=True)
class Observation:
    """What one prompt shows of one model.

    Attributes:
        quantity: Name of the quantity.
        prompt: Id of the prompt or item.
        value: The number, None where there is none.
        unit: Its unit.
        params: What else identifies the cell.
        weight: What the number is per, such as bytes.
        rate: Whether it is yes (1) or no (0).
        control: Which control it is.
        reason: Why there is no number, or what else must be said of it; a short word.
        positions: Where it was read, if at one position.
    """

    quantity: str
    prompt: str
    value: float | None
    unit: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    rate: bool = False
    control: str = "none"
    reason: str | None = None
    positions: str | None = None

    @property
    def cell(self) -> Cell:
        """What it belongs to."""
        return self.quantity, self.control, tuple(sorted(self.params.items()))


def records(
    observed: Mapping[str, Iterable[Observation]], contrasts: Sequence[tuple[str, str]], seed: int
) -> Iterator[Record]:
    """Yield a record for each model and cell, and for each contrast of two models and cell.

    Args:
        observed: Observations by model.
        contrasts: Pairs of models (a, b) whose difference a − b is wanted. That of tuned and base is the
            difference of the pair; others are named by the parameter `contrast`.
        seed: Seed of resampling.
    """
    cells: dict[str, dict[Cell, list[Observation]]] = {}
    for model, found in observed.items():
        cells[model] = defaultdict(list)
        for observation in found:
            cells[model][observation.cell].append(observation)
        for cell, group in cells[model].items():
            yield _single(group, cell, model, seed)
    for a, b in contrasts:
        name = {} if (a, b) == ("tuned", "base") else {"contrast": f"{a}-{b}"}
        for cell, group in cells[a].items():
            if cell[1] == "none" and cell in cells[b]:
                yield _difference(group, cells[b][cell], cell, name, seed)


def _single(group: Sequence[Observation], cell: Cell, model: str, seed: int) -> Record:
    kept = [o for o in group if o.value is not None]
    about = _about(group, cell, model, {})
    if not kept or sum(o.weight for o in kept) <= 0:
        return _missing(group, cell, about)
    if all(o.rate for o in kept):
        estimate = binomial_interval(round(sum(o.value or 0.0 for o in kept)), len(kept))
    else:
        draws = generator(seed, cell[0])
        estimate = bootstrap_sums(_columns(kept), lambda sums: _ratio(sums[:, :2]), generator=draws)
    return estimated(cell[0], estimate, about)


def _difference(
    first: Sequence[Observation],
    second: Sequence[Observation],
    cell: Cell,
    name: Mapping[str, str],
    seed: int,
) -> Record:
    by_prompt = {o.prompt: o for o in second if o.value is not None}
    pairs = [(o, by_prompt[o.prompt]) for o in first if o.value is not None and o.prompt in by_prompt]
    about = _about([*first, *second], cell, "pair", name)
    weights = [sum(o.weight for o in side) for side in zip(*pairs, strict=True)]
    if not pairs or min(weights) <= 0:
        return _missing([*first, *second], cell, about)
    if all(o.rate for o in first):
        yes = [[bool(o.value) for o in side] for side in zip(*pairs, strict=True)]
        estimate = paired_difference(yes[0], yes[1])
    else:
        estimate = bootstrap_sums(
            torch.cat([_columns(side) for side in zip(*pairs, strict=True)], 1),
            lambda sums: _ratio(sums[:, :2]) - _ratio(sums[:, 2:]),
            generator=generator(seed, cell[0]),
        )
    return estimated(cell[0], estimate, about)


def _about(group: Sequence[Observation], cell: Cell, model: str, name: Mapping[str, str]) -> dict[str, Any]:
    reasons = sorted({o.reason for o in group if o.reason is not None})
    return {
        "question": "rq1",
        "unit": group[0].unit,
        "split": "eval",
        "control": cell[1],
        "params": dict(cell[2]) | dict(name),
        "model": model,
        "positions": group[0].positions,
        "flags": tuple(reasons),
    }


def _missing(group: Sequence[Observation], cell: Cell, about: dict[str, Any]) -> Record:
    reason = next((o.reason for o in group if o.reason is not None), "nothing_said")
    return Record(quantity=cell[0], value=None, n=0, reason=reason, **about)


def _columns(group: Sequence[Observation]) -> Tensor:
    return torch.tensor([[o.value, o.weight] for o in group], dtype=torch.float64)


def _ratio(sums: Tensor) -> Tensor:
    """Divide; a resample that weighs nothing counts as 0."""
    return torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1].clamp(min=1e-300), 0.0)
