"""Tests that a number stays within a bound: what shows that something is small, not that nothing was found.

1. A mean over prompts is tested against a bound by Student's t, on one side.
2. Two such tests, one at either end, show that a mean is within ± a bound (equivalence); the larger p counts.
3. A count is tested against a share by the exact binomial distribution.

Source: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987) 657 (two one-sided tests);
Clopper and Pearson, Biometrika 26 (1934).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.intervals import checked
from mechdiff.functional.percentiles import student_below


def mean_below(table: Tensor, bound: float) -> Tensor:
    """Test each column's mean for being below a bound.

    Args:
        table: `(prompts, columns)`.
        bound: In the unit of the table.

    Returns:
        p of the hypothesis that the mean is at least the bound, `(columns,)`.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> mean_below(torch.tensor([[0.0, 2.0], [0.1, 3.0], [0.2, 4.0]]), 1.0).round(decimals=3).tolist()
    [0.002, 0.963]
    """
    table = checked(table)
    n, gap = len(table), table.mean(0) - bound
    t = gap / (table.std(0) / math.sqrt(n))  # without spread: infinite, or undefined at the bound itself
    return torch.tensor([student_below(x, n) for x in t.nan_to_num(0.0).tolist()], dtype=torch.float64)


def equivalent(table: Tensor, bound: float) -> Tensor:
    """Test each column's mean for being within ± a bound.

    Args:
        table: `(prompts, columns)`.
        bound: Above 0, in the unit of the table.

    Returns:
        p of the hypothesis that the mean is at least as far from 0 as the bound, `(columns,)`.

    Raises:
        FitError: If there are fewer than 2 prompts, or the bound is not above 0.

    >>> equivalent(torch.tensor([[0.0, 2.0], [0.1, 3.0], [0.2, 4.0]]), 1.0).round(decimals=3).tolist()
    [0.002, 0.963]
    """
    if bound <= 0:
        raise FitError(f"bound={bound:g}: what is small needs a bound above 0")
    return torch.maximum(mean_below(table, bound), mean_below(-table, bound))


def share_below(successes: int, n: int, bound: float) -> float:
    """Test a proportion for being below a bound.

    Args:
        successes: Number of successes, 0 to `n`.
        n: Number of trials, at least 1.
        bound: Between 0 and 1.

    Returns:
        p of the hypothesis that the proportion is at least the bound: P(X ≤ successes) at the bound.

    Raises:
        FitError: If a number is out of range.

    >>> round(share_below(0, 40, 0.072), 3), round(share_below(0, 10, 0.072), 3)  # none of 10 shows little
    (0.05, 0.474)
    """
    if n < 1 or not 0 <= successes <= n or not 0 < bound < 1:
        raise FitError(
            f"successes={successes} of n={n} against {bound:g}: n must be at least 1, successes in 0..n, "
            "the bound between 0 and 1"
        )
    i = torch.arange(successes + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    log_p = torch.logsumexp(log_choose + i * math.log(bound) + (n - i) * math.log1p(-bound), 0)
    return min(float(log_p.exp()), 1.0)
