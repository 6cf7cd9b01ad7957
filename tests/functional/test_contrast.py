"""Differences of two estimates: apart, and where both rest on the same prompts."""

from __future__ import annotations

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.contrast import independent_difference, recovery_difference
from mechdiff.functional.stats import bootstrap_ratio, generator


def cells(n: int = 60) -> torch.Tensor:
    """Return two recoveries on the same prompts, which go up and down together."""
    draws = torch.Generator().manual_seed(3)
    gap = torch.rand(n, generator=draws).double() + 0.5
    share = torch.rand(n, generator=draws).double()
    return torch.stack([share * gap, gap, 0.8 * share * gap, gap], 1)


def test_shared_prompts_take_out_what_both_have_in_common() -> None:
    table = cells()
    found = recovery_difference(table, generator=generator(1))
    assert found.value == pytest.approx(0.2 * float(table[:, 0].sum() / table[:, 1].sum()))
    assert found.n == 60
    ends = [
        bootstrap_ratio(table[:, i], table[:, i + 1], generator=generator(1), complement=True) for i in (0, 2)
    ]
    apart = independent_difference(ends[0], ends[1])
    assert apart.value == pytest.approx(found.value)
    assert found.high - found.low < 0.3 * (apart.high - apart.low)


def test_prompts_that_one_has_not_seen_count_once_and_for_the_other_alone() -> None:
    table = cells()
    first, second = (torch.cat([part, torch.zeros_like(part)]) for part in table.split(2, 1))
    alone = torch.cat([first, second.roll(60, 0)], 1)
    found = recovery_difference(alone, generator=generator(1))
    assert found.value == pytest.approx(recovery_difference(table, generator=generator(1)).value)
    assert found.n == 120
    ends = [
        bootstrap_ratio(table[:, i], table[:, i + 1], generator=generator(1), complement=True) for i in (0, 2)
    ]
    apart = independent_difference(ends[0], ends[1])
    assert found.high - found.low == pytest.approx(apart.high - apart.low, rel=0.15)


def test_a_recovery_without_a_gap_is_refused() -> None:
    table = cells()
    table[:, 3] = 0
    with pytest.raises(FitError, match="gaps above 0"):
        recovery_difference(table, generator=generator(1))
