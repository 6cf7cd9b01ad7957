"""How often a 95 % interval holds the number it is about, by drawing samples from a pool of prompts.

1. A pool of thousands of prompts stands for all prompts, so its value is the truth.
2. A sample of n prompts is drawn from it with replacement, and an interval is built by the very function that
   runs use. Over many samples, the share of intervals that hold the truth is the coverage.
3. With families, n / ``PER_FAMILY`` sentence patterns are drawn and then prompts of each; the interval
   resamples whole families, or, for comparison, takes their prompts for independent.

No model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechdiff.calibration.cells import Cell
from mechdiff.calibration.pool import Pool
from mechdiff.config import SEED
from mechdiff.functional.contrast import independent_difference
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.paired import paired_difference
from mechdiff.functional.percentiles import BCA_FROM
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import Interval, bootstrap_mean, bootstrap_ratio, generator, jackknife

PROMPTS = (12, 24, 40, 80, 160)
"""Sizes of samples."""

TRIALS = 1000
"""Samples of each size; the coverage is then known to about 1.5 percentage points."""

TARGET = (0.93, 0.97)
"""Coverage that is asked for of an interval whose name says 0.95."""

PER_FAMILY = 4
"""Prompts of each family in a sample of families."""

IGNORED = "families taken for prompts"
"""A mistake, shown beside what is right; nothing is asked of it."""

FEW = "Resamples of so few families stay between the least and the greatest of them."

WIDE = (
    "Tails that are expanded for few prompts hold more than they need to where prompts are of two kinds, as "
    "here (declined or not): an error on the safe side."
)

Sample = Mapping[str, Tensor]
"""Columns of a pool at the prompts of a sample, with ``family`` if whole families are to be resampled."""


@dataclass(frozen=True)
class Estimate:
    """An interval as runs build it, and the truth that it is about.

    Attributes:
        interval: From a sample.
        truth: From sums over the whole pool, each family with the same weight.
        families: Whether it can resample whole families.
        asked: Whether runs use it for this; else it is there for comparison and nothing is asked of it.
        left: Column of a recovery's numerator.
    """

    interval: Callable[[Sample, torch.Generator], Interval]
    truth: Callable[[Mapping[str, float]], float]
    families: bool = True
    asked: bool = True
    left: str | None = None


def _mean(name: str) -> Estimate:
    return Estimate(
        lambda s, draws: bootstrap_mean(s[name], generator=draws, groups=s.get("family")), lambda m: m[name]
    )


def _recovery(sample: Sample, draws: torch.Generator, left: str = "half") -> Interval:
    groups = sample.get("family")
    return bootstrap_ratio(sample[left], sample["gap"], generator=draws, groups=groups, complement=True)


def _recovered(left: str) -> Estimate:
    return Estimate(lambda s, draws: _recovery(s, draws, left), lambda m: 1 - m[left] / m["gap"], left=left)


def _two_recoveries(sample: Sample, draws: torch.Generator) -> Interval:
    """Compare the first half of a sample with the second, of other prompts."""
    half = len(sample["gap"]) // 2
    parts = ({k: v[:half] for k, v in sample.items()}, {k: v[half:] for k, v in sample.items()})
    return independent_difference(*(_recovery(part, draws) for part in parts))


def _jackknifed(sample: Sample, _: torch.Generator) -> Interval:
    total, n = sample["gap"].sum(), len(sample["gap"])
    return jackknife((total - sample["gap"]) / (n - 1), float(total) / n)


def _plain(sample: Sample, draws: torch.Generator) -> Interval:
    gap = sample["gap"][:, None]
    return bootstrap_means(gap, generator=draws, method="percentile", expand=False).at(0)


ESTIMATES: dict[str, Estimate] = {
    "mean of a gap": _mean("gap"),
    "mean of a gap, jackknife": Estimate(_jackknifed, lambda m: m["gap"], families=False, asked=False),
    "mean of a gap, plain percentiles": Estimate(_plain, lambda m: m["gap"], families=False, asked=False),
    "mean of a difference": _mean("shift"),
    "recovery of a part": _recovered("half"),
    "recovery of nearly all": _recovered("left"),
    "difference of recoveries, other prompts": Estimate(_two_recoveries, lambda _: 0.0, families=False),
    "proportion, exact": Estimate(
        lambda s, _: binomial_interval(int(s["tuned"].sum()), len(s["tuned"])),
        lambda m: m["tuned"],
        families=False,
    ),
    "difference of two rates, same prompts": Estimate(
        lambda s, _: paired_difference(s["tuned"].bool().tolist(), s["base"].bool().tolist()),
        lambda m: m["tuned"] - m["base"],
        families=False,
    ),
}
"""The intervals that runs report, by what they are of, and two others to compare them with."""


def coverage(
    pool: Pool,
    *,
    seed: int = SEED,
    prompts: Sequence[int] = PROMPTS,
    trials: int = TRIALS,
    names: Sequence[str] = tuple(ESTIMATES),
) -> list[Cell]:
    """Count how often intervals hold the pool's own value.

    Args:
        pool: Numbers by prompt.
        seed: Seed of the samples and of the resamples.
        prompts: Sizes of the samples.
        trials: Samples of each size.
        names: Which of ``ESTIMATES``.

    Returns:
        A cell for each estimate, kind of sampling and size.
    """
    families = _families(pool.family)
    found = []
    for name in names:
        estimate = ESTIMATES[name]
        for kind in ("prompts", *(("families", IGNORED) if estimate.families else ())):
            truth = estimate.truth(_means(pool, families if kind != "prompts" else None))
            for n in prompts:
                held = 0
                for trial in range(trials):
                    draws = generator(seed, "coverage", n, trial)
                    sample = _sample(pool, families, kind, n, draws)
                    interval = estimate.interval(sample, draws)
                    held += interval.low <= truth <= interval.high
                about: dict[str, Any] = {
                    "question": "intervals",
                    "quantity": "coverage",
                    "method": name,
                    "kind": kind,
                }
                target = TARGET if estimate.asked and kind != IGNORED else None
                about["note"] = _note(pool, estimate, kind, n, held / trials)
                found.append(Cell.count(held, trials, **about, strength=None, prompts=n, target=target))
    return found


def _note(pool: Pool, estimate: Estimate, kind: str, n: int, share: float) -> str | None:
    """Say why a share is out of range, where that is known."""
    if kind == "families" and n // PER_FAMILY < BCA_FROM:
        return FEW
    if share > TARGET[1]:
        return WIDE
    if estimate.left is None:
        return None
    held = pool.columns[estimate.left].sort(descending=True).values.cumsum(0)
    few = (int((held < held[-1] / 2).sum()) + 1) / len(held)
    return f"Half of what is left rests on {few:.1%} of all prompts; a sample without them cannot know of it."


def _families(family: Tensor) -> list[Tensor]:
    """Return the prompts of each family."""
    return list(family.argsort(stable=True).split(family.bincount().tolist()))


def _means(pool: Pool, families: Sequence[Tensor] | None) -> dict[str, float]:
    """Return the mean of each column, of families with the same weight if there are any."""
    columns = pool.columns.items()
    if families is None:
        return {name: float(column.mean()) for name, column in columns}
    return {name: float(torch.stack([column[f].mean() for f in families]).mean()) for name, column in columns}


def _sample(
    pool: Pool, families: Sequence[Tensor], kind: str, n: int, draws: torch.Generator
) -> dict[str, Tensor]:
    """Draw n prompts, or families and then prompts of each, with replacement."""
    if kind == "prompts":
        picks = torch.randint(len(pool.family), (n,), generator=draws)
        return {name: column[picks] for name, column in pool.columns.items()}
    drawn = torch.randint(len(families), (n // PER_FAMILY,), generator=draws).tolist()
    parts = [families[f][torch.randint(len(families[f]), (PER_FAMILY,), generator=draws)] for f in drawn]
    sample = {name: column[torch.cat(parts)] for name, column in pool.columns.items()}
    if kind == "families":
        sample["family"] = torch.arange(len(drawn)).repeat_interleave(PER_FAMILY)
    return sample
