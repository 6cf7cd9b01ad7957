"""Seeded generators and intervals over prompts.

1. Prompts are the unit: rows that belong to one prompt are summed first and resampled together.
2. Means and ratios of means get a percentile bootstrap; U-statistics a delete-one jackknife; counts an exact
   binomial interval.
3. Rows are put in order of their values before anything is summed or drawn, so the order of the prompts
   changes nothing, bit for bit.

Everything is computed in float64 on the CPU.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 11 and 13; Clopper and
Pearson, Biometrika 26 (1934).
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL, NOISE_FACTOR
from mechdiff.errors import FitError

Groups = Tensor | Sequence[Hashable]
"""One label per row; rows with the same label belong to one prompt."""

_CHUNK = 2**22  # entries of one block of bootstrap weights: 32 MB


class Interval(NamedTuple):
    """A number with its uncertainty.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Number of independent units (prompts) behind it.
    """

    value: float
    low: float
    high: float
    n: int


def generator(seed: int, *names: object) -> torch.Generator:
    """Make a CPU generator that depends on the seed and the names alone, in any process.

    >>> generator(17, "r2", 3).initial_seed() == generator(17, "r2", 3).initial_seed()
    True
    >>> generator(17, "r2").initial_seed() == generator(17, "cka").initial_seed()
    False
    """
    key = "\x1f".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def group_index(groups: Groups | None, rows: int) -> Tensor:
    """Number the groups 0, 1, ... in order of first appearance.

    Args:
        groups: One label per row, or None when every row is its own group.
        rows: Number of rows.

    Returns:
        Group number of each row, `(rows,)`, int64, on the CPU.

    >>> group_index(["b", "a", "b"], 3).tolist()
    [0, 1, 0]
    """
    if groups is None:
        return torch.arange(rows)
    labels = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    assert len(labels) == rows, f"{len(labels)} group labels for {rows} rows"
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)


def bootstrap_mean(
    values: Tensor,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
    groups: Groups | None = None,
) -> Interval:
    """Estimate a mean over rows and its percentile bootstrap interval.

    Args:
        values: One number per row, `(rows,)`.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.
        groups: Prompt of each row; whole prompts are resampled. Every row counts the same in the mean.

    Raises:
        FitError: If there are no rows.

    >>> bootstrap_mean(torch.tensor([1.0, 1.0, 1.0]), generator=generator(17)) == (1.0, 1.0, 1.0, 3)
    True
    """
    ones = torch.ones_like(values, dtype=torch.float64)
    return bootstrap_ratio(values, ones, generator=generator, draws=draws, level=level, groups=groups)


def bootstrap_ratio(
    numerator: Tensor,
    denominator: Tensor,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
    groups: Groups | None = None,
    complement: bool = False,
) -> Interval:
    """Estimate a ratio of means and its percentile bootstrap interval, resampling both together.

    A resample whose denominator is zero or of the other sign bounds nothing: it pushes both ends outwards, to
    infinity if there are enough of them. Check `measurable` on the denominator first.

    Args:
        numerator: One number per row, `(rows,)`.
        denominator: One number per row, `(rows,)`.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.
        groups: Prompt of each row; whole prompts are resampled.
        complement: Return 1 − ratio: a recovery, an R².

    Raises:
        FitError: If there are no rows, or the denominator sums to zero.

    >>> patched, unpatched = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])
    >>> bootstrap_ratio(patched, unpatched, generator=generator(17), complement=True) == (0.75, 0.75, 0.75, 2)
    True
    """
    cells = _clusters(torch.stack([_finite(numerator), _finite(denominator)], 1), groups)
    top, bottom = cells.sum(0).tolist()
    if bottom == 0:
        raise FitError(f"the denominator of a ratio over {len(cells)} prompts is 0; it must differ from 0")
    tops, bottoms = resample(cells, draws, generator).unbind(1)
    ratios, usable = tops / bottoms, bottoms * math.copysign(1.0, bottom) > 0
    value, ratios = (1 - top / bottom, 1 - ratios) if complement else (top / bottom, ratios)
    low, high = _percentiles(ratios, usable, level)
    return Interval(value, low, high, len(cells))


def bootstrap_correlation(
    x: Tensor,
    y: Tensor,
    classes: Groups | None = None,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Estimate the pooled within-class Pearson correlation and its bootstrap interval.

    Both variables are centred within each class, in the sample and again in each resample, so a difference
    between classes is not mistaken for agreement within them. Resampling keeps the size of every class. A
    resample without variance counts as 0.

    Args:
        x: One number per prompt, `(n,)`.
        y: One number per prompt, `(n,)`.
        classes: Class of each prompt (for example target or neutral); None is one class.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.

    Raises:
        FitError: If either variable is constant within every class.

    >>> x = torch.tensor([0.0, 1.0, 10.0, 11.0])
    >>> round(bootstrap_correlation(x, -x, ["a", "a", "b", "b"], generator=generator(17)).value, 6)
    -1.0
    """
    pairs = torch.stack([_finite(x), _finite(y)], 1)
    index = (
        group_index(classes, len(pairs))
        if classes is not None
        else torch.zeros(len(pairs), dtype=torch.int64)
    )
    parts = sorted((_ordered(pairs[index == c]) for c in index.unique()), key=lambda part: part.tolist())
    full, drawn = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(draws, 3, dtype=torch.float64)
    for part in parts:
        a, b = (part - part.mean(0)).unbind(1)
        cells = torch.stack([a * b, a * a, b * b, a, b], 1)
        full += _products(cells.sum(0, keepdim=True), len(part))
        drawn += _products(resample(cells, draws, generator), len(part))
    spread = torch.cat([part.abs().max(0, keepdim=True).values for part in parts]).max(0).values ** 2
    if bool((full[0, 1:] <= 1e-28 * spread).any()):
        raise FitError(
            f"a correlation over {len(pairs)} prompts is undefined: one side is constant within every class"
        )
    value, r = (_correlation(products, 1e-28 * spread) for products in (full, drawn))
    low, high = _percentiles(r, torch.ones_like(r, dtype=torch.bool), level)
    return Interval(value.item(), low, high, len(pairs))


def bootstrap_sums(
    cells: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
    groups: Groups | None = None,
) -> Interval:
    """Estimate a function of column sums and its percentile bootstrap interval.

    Args:
        cells: Columns to sum, `(rows, columns)`.
        statistic: Turns sums `(draws, columns)` into numbers `(draws,)`.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.
        groups: Prompt of each row; whole prompts are resampled.

    >>> bootstrap_sums(torch.ones(3, 2), lambda s: s[:, 0] / s[:, 1], generator=generator(17)) == (1, 1, 1, 3)
    True
    """
    index, cells = group_index(groups, len(cells)), cells.detach().to("cpu", torch.float64)
    order = cells.sum(1).argsort(stable=True)
    sums = torch.zeros(int(index.max()) + 1, cells.shape[1], dtype=torch.float64)
    sums.index_add_(0, index[order], cells[order])
    sums = sums[sums.sum(1).argsort(stable=True)]
    values = statistic(resample(sums, draws, generator))
    low, high = _percentiles(values, torch.ones_like(values, dtype=torch.bool), level)
    return Interval(statistic(sums.sum(0, keepdim=True)).item(), low, high, len(sums))


def jackknife(leave_one_out: Tensor, value: float, level: float = LEVEL) -> Interval:
    """Put a normal interval around a statistic from its delete-one values.

    Args:
        leave_one_out: The statistic without each prompt in turn, `(n,)`.
        value: The statistic on all prompts.
        level: Coverage.

    Returns:
        `value` ± z·se with se² = (n − 1)/n · Σ (θ₋ᵢ − mean)².

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> interval = jackknife((x.sum() - x) / 3, 2.5)  # of a mean: z times the usual standard error
    >>> round(interval.high - interval.value, 4), round(1.959964 * (x.std() / 2).item(), 4)
    (1.2652, 1.2652)
    """
    values = _finite(leave_one_out).sort().values
    n = len(values)
    half = _z(level) * math.sqrt((n - 1) / n * (values - values.mean()).square().sum().item())
    return Interval(value, value - half, value + half, n)


def measurable(gap: Interval, noise_floor: float = 0.0) -> bool:
    """Say whether a gap is large enough to divide by.

    Args:
        gap: A mean and its interval, positive when there is something to explain.
        noise_floor: What the same quantity measures when nothing differs, in the unit of `gap`.

    Returns:
        True if the interval lies above 0 and the value above `NOISE_FACTOR` noise floors.

    >>> measurable(Interval(2.0, 1.5, 2.5, 40), 0.01), measurable(Interval(0.1, -0.1, 0.3, 40))
    (True, False)
    """
    return gap.low > 0 and gap.value > NOISE_FACTOR * noise_floor


def _finite(values: Tensor) -> Tensor:
    """Return a float64 CPU copy; anything that is not finite is a fault upstream."""
    values = values.detach().to("cpu", torch.float64)
    assert values.ndim == 1, f"expected one number per row, got shape {tuple(values.shape)}"
    assert bool(values.isfinite().all()), "statistics need finite values"
    if not len(values):
        raise FitError("an interval over 0 rows is undefined; at least 1 row is needed")
    return values


def row_order(cells: Tensor) -> Tensor:
    """Return the indices that sort rows lexicographically.

    >>> row_order(torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 2.0]])).tolist()
    [2, 1, 0]
    """
    return cells.unique(dim=0, return_inverse=True)[1].argsort(stable=True)


def _ordered(cells: Tensor) -> Tensor:
    return cells[row_order(cells)]


def _clusters(cells: Tensor, groups: Groups | None) -> Tensor:
    """Sum the rows of each group, in an order that depends on the values alone."""
    if groups is None:
        return _ordered(cells)
    index = group_index(groups, len(cells))
    return _ordered(torch.stack([_ordered(rows).sum(0) for rows in _split(cells, index)]))


def _split(cells: Tensor, index: Tensor) -> Iterable[Tensor]:
    return cells[index.argsort(stable=True)].split(index.bincount().tolist())


def resample(cells: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sum the columns of `(n, c)` over `draws` samples of n rows with replacement: `(draws, c)`.

    >>> resample(torch.ones(3, 1, dtype=torch.float64), 2, generator(17)).tolist()
    [[3.0], [3.0]]
    """
    n, step = len(cells), max(1, _CHUNK // len(cells))
    sums = []
    for start in range(0, draws, step):
        picks = torch.randint(n, (min(step, draws - start), n), generator=generator)
        counts = torch.zeros(picks.shape, dtype=torch.float64)
        sums.append(counts.scatter_add_(1, picks, torch.ones_like(counts)) @ cells)
    return torch.cat(sums)


def _products(sums: Tensor, n: int) -> Tensor:
    """Turn sums of ab, aa, bb, a, b over n rows into centred ab, aa, bb."""
    ab, aa, bb, a, b = sums.unbind(1)
    return torch.stack([ab - a * b / n, aa - a * a / n, bb - b * b / n], 1)


def _correlation(products: Tensor, floor: Tensor) -> Tensor:
    ab, aa, bb = products.unbind(1)
    defined = (aa > floor[0]) & (bb > floor[1])
    return torch.where(defined, ab / (aa * bb).where(defined, torch.ones(())).sqrt(), 0.0).clamp(-1, 1)


def _percentiles(values: Tensor, usable: Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low = torch.where(usable, values, -math.inf).quantile(tail, interpolation="lower")
    high = torch.where(usable, values, math.inf).quantile(1 - tail, interpolation="higher")
    return low.item(), high.item()


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
