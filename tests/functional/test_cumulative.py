import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.cumulative import areas, concentration, cumulative, grid_counts, random_order
from mechdiff.functional.stats import bootstrap_ratio, generator, measurable


def normal(*shape, name="cumulative"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, shape))


def patched(heads, order, ks):
    """What additive heads `(prompts, heads)` add when the first k of an order are patched."""
    return heads[:, order].cumsum(1)[:, torch.tensor(ks) - 1]


@pytest.mark.parametrize("count", [6, 24, 270, 1024])
def test_additive_heads_in_random_order_have_areas_of_one_half(count):
    heads, ks = normal(8, count).abs() + 0.1, grid_counts(count)
    none = normal(8, name="none")
    orders = [torch.randperm(count, generator=generator(1, i)) for i in range(400)]
    some = torch.stack([none[:, None] + patched(heads, order, ks) for order in orders])
    curve, area = random_order(none, some, ks)
    assert curve.value.tolist() == pytest.approx([k / count for k in ks], abs=0.03)
    assert area.value.tolist() == pytest.approx([0.5, 0.5], abs=0.015)
    assert (curve.low <= curve.value).all()
    assert (curve.value <= curve.high).all()


def test_the_grid_is_that_of_mib_with_at_least_one_head():
    assert grid_counts(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert grid_counts(5) == [1, 3, 5]
    assert grid_counts(1) == [1]


def test_all_heads_are_one_and_the_best_order_is_above_the_rest():
    heads, ks = normal(40, 50) * 0.1 + torch.linspace(0, 1, 50, dtype=torch.float64) ** 4, grid_counts(50)
    order = heads.mean(0).argsort(descending=True)
    none = normal(40, name="none")
    found = cumulative(none, none[:, None] + patched(heads, order, ks), ks, generator=generator(2))
    ends = torch.stack(found.curve[:3])[:, -1]
    assert ends.tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    back = cumulative(none, none[:, None] + patched(heads, order.flip(0), ks), ks, generator=generator(2))
    assert back.cpr.high < 0.5 < found.cpr.low
    assert found.cmd.high < 0.5 < back.cmd.low
    assert found.gap.value == pytest.approx(heads.sum(1).mean().item())
    assert measurable(found.gap)
    # an effect of the other sign is the same share
    mirror = cumulative(-none, -none[:, None] - patched(heads, order, ks), ks, generator=generator(2))
    assert mirror.curve.value.tolist() == pytest.approx(found.curve.value.tolist())


def test_a_curve_above_one_counts_twice():
    """MIB: overshooting adds to the area under f and to the distance from 1."""
    found = areas(torch.tensor([[1.5, 1.5, 1.0]]), torch.tensor([0.0, 0.25, 0.75, 1.0]))[0]
    assert found.tolist() == pytest.approx([0.1875 + 0.75 + 0.3125, 0.1875 + 0.25 + 0.0625])


def test_intervals_are_those_of_a_ratio_of_means():
    none = normal(24, name="none")
    some = none[:, None] + (normal(24, 2, name="some") * 0.3 + torch.tensor([1.0, 2.0])).abs()
    found = cumulative(none, some, [3, 10], generator=generator(3), draws=20_000)
    effects = (some - none[:, None]).numpy()
    theirs = reference.bootstrap(
        (effects[:, 0], effects[:, 1]),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="BCa",
        rng=np.random.default_rng(3),
    ).confidence_interval
    low, high = found.curve.at(0)[1:3]
    assert 0 < theirs.low - low < 0.01  # a little wider: the tails are expanded
    assert 0 < high - theirs.high < 0.01
    plain = bootstrap_ratio(*torch.tensor(effects).T, generator=generator(3))
    assert found.curve.at(0).value == pytest.approx(plain.value, rel=1e-12)


def test_an_effect_that_may_be_nothing_bounds_nothing():
    none = torch.zeros(6)
    some = torch.stack([torch.ones(6), torch.tensor([3.0, -2.9, 0.4, -0.2, 0.1, 0.3])], 1)
    found = cumulative(none, some, [1, 4], generator=generator(4))
    assert not measurable(found.gap)
    assert (found.cpr.low, found.cpr.high) == (-math.inf, math.inf)
    with pytest.raises(FitError, match="all 4 heads together have no effect"):
        cumulative(none, some * 0, [1, 4], generator=generator(4))
    with pytest.raises(FitError, match="no effect"):
        random_order(none, some[None] * 0, [1, 4])


def test_concentration_counts_the_largest_heads():
    effects = normal(30, 80) * 0.05 + normal(80, name="heads") ** 3
    sizes = np.sort(np.abs(effects.mean(0).numpy()))[::-1].cumsum()
    found = concentration(effects, generator=generator(5))
    for share, count in zip((0.5, 0.8), found.value.tolist(), strict=True):
        assert sizes[int(count) - 2] < share * sizes[-1] <= sizes[int(count) - 1]
    assert (found.low <= found.value).all()
    assert (found.value <= found.high).all()
    equal = concentration(torch.ones(5, 10), [0.5, 0.75, 1.0], generator=generator(5))
    assert equal.value.tolist() == [5, 8, 10]
    nothing = concentration(torch.zeros(5, 10), generator=generator(5))
    assert torch.stack(nothing[:3]).eq(0).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_prompts_changes_nothing(seed):
    none, some = normal(9, name=("n", seed)), normal(9, 3, name=("s", seed)) + 2
    rows = torch.randperm(9, generator=generator(seed, "order"))

    def answers(n, s):
        found = cumulative(n, s, [1, 2, 4], generator=generator(6), draws=50)
        counted = concentration(s, generator=generator(6), draws=50)
        return torch.cat([torch.stack(found.curve[:3]).flatten(), torch.stack(counted[:3]).flatten()])

    assert torch.equal(answers(none[rows], some[rows]), answers(none, some))
