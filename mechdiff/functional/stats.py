"""Seeded generators and intervals over prompts.

1. Prompts are the unit: rows that belong to one prompt are summed first and resampled together.
2. Means and ratios of means get a bootstrap, its percentiles corrected and expanded for few prompts
   (`percentiles`); U-statistics a delete-one jackknife; counts an exact binomial interval.
3. Rows are put in order of their values before anything is summed or drawn, so the order of the prompts
   changes nothing, bit for bit.

Everything is computed in float64 on the CPU.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 11 and 13; Clopper and
Pearson, Biometrika 26 (1934).
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL, NOISE_FACTOR
from mechdiff.errors import FitError
from mechdiff.functional.percentiles import corrects, counting, ends, student

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
    """Estimate a mean over rows and its bootstrap interval.

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
    """Estimate a ratio of means and its bootstrap interval, resampling both together.

    A resample whose denominator is zero or of the other sign bounds nothing: it pushes both ends outwards, to
    infinity if there are enough of them. Check `measurable` on the denominator first. Where few prompts hold
    most of the denominator, the interval is that of few prompts.

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
    cells = _clusters(torch.stack([finite(numerator), finite(denominator)], 1), groups)
    bottom = cells[:, 1].sum().item()
    if bottom == 0:
        raise FitError(f"the denominator of a ratio over {len(cells)} prompts is 0; it must differ from 0")

    def ratio(sums: Tensor) -> Tensor:
        usable = sums[:, 1] * math.copysign(1.0, bottom) > 0
        share = torch.where(usable, sums[:, 0] / sums[:, 1], math.nan)
        return 1 - share if complement else share

    return _bootstrapped(cells, ratio, draws, level, generator, counting(cells[:, 1]))


def bootstrap_sums(
    cells: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
    groups: Groups | None = None,
) -> Interval:
    """Estimate a function of column sums and its bootstrap interval.

    Args:
        cells: Columns to sum, `(rows, columns)`.
        statistic: Turns sums `(draws, columns)` into numbers `(draws,)`; sums of all columns times a number
            must give the same, as of a ratio. NaN where it is undefined.
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
    return _bootstrapped(sums, statistic, draws, level, generator)


def jackknife(leave_one_out: Tensor, value: float, level: float = LEVEL) -> Interval:
    """Put an interval of Student's t around a statistic from its delete-one values.

    Args:
        leave_one_out: The statistic without each prompt in turn, `(n,)`.
        value: The statistic on all prompts.
        level: Coverage.

    Returns:
        `value` ± t·se with se² = (n − 1)/n · Σ (θ₋ᵢ − mean)², t with n − 1 degrees of freedom; unbounded with
        one prompt.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> interval = jackknife((x.sum() - x) / 3, 2.5)  # of a mean: t times the usual standard error
    >>> round(interval.high - interval.value, 4), round(3.182446 * (x.std() / 2).item(), 4)
    (2.0543, 2.0543)
    """
    values = finite(leave_one_out).sort().values
    n = len(values)
    error = math.sqrt((n - 1) / n * (values - values.mean()).square().sum().item())
    half = student(level, n) * error if n > 1 else math.inf
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


def finite(values: Tensor) -> Tensor:
    """Return a float64 CPU copy of a number per row; anything that is not finite is a fault upstream.

    Raises:
        FitError: If there are no rows.

    >>> finite(torch.tensor([1, 2])).dtype
    torch.float64
    """
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


def ordered(cells: Tensor) -> Tensor:
    """Return the rows in lexicographic order.

    >>> ordered(torch.tensor([[2.0], [1.0]])).tolist()
    [[1.0], [2.0]]
    """
    return cells[row_order(cells)]


def _clusters(cells: Tensor, groups: Groups | None) -> Tensor:
    """Sum the rows of each group, in an order that depends on the values alone."""
    if groups is None:
        return ordered(cells)
    index = group_index(groups, len(cells))
    return ordered(torch.stack([ordered(rows).sum(0) for rows in _split(cells, index)]))


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


def _bootstrapped(
    sums: Tensor,
    statistic: Callable[[Tensor], Tensor],
    draws: int,
    level: float,
    generator: torch.Generator,
    count: int | None = None,
) -> Interval:
    """Bound a function of column sums over prompts, of which so many count."""
    n, total = len(sums), sums.sum(0, keepdim=True)
    value = statistic(total)
    left_out = statistic(total - sums)[:, None] if corrects(n) else None
    drawn = statistic(resample(sums, draws, generator))[:, None]
    low, high = ends(value, drawn, (count or n) if n > 1 else None, level, left_out)
    return Interval(value.item(), low.item(), high.item(), n)
