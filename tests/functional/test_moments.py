from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdiff.errors import FitError
from mechdiff.functional.moments import Moments
from mechdiff.functional.stats import generator


def gaussian(*shape, name="x"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def close(a, b, tolerance=1e-12):
    return all(
        (a.tensors()[k] - b.tensors()[k]).abs().max() <= tolerance * (1 + b.tensors()[k].abs().max())
        for k in a.tensors()
    )


X, Y = gaussian(60, 5) + 100, gaussian(60, 3, name="y") - 7


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 1000))
def test_any_split_and_order_gives_one_answer(cuts, seed):
    order = torch.randperm(60, generator=generator(seed))
    edges = [0, *sorted(cuts), 60]
    streamed, halves = Moments.zeros(5, 3), [Moments.zeros(5, 3), Moments.zeros(5, 3)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        rows = order[start:stop]
        streamed.update(X[rows], Y[rows])
        halves[number % 2].update(X[rows], Y[rows])
    halves[0].merge(halves[1])
    assert close(streamed, Moments.of(X, Y))
    assert close(halves[0], streamed)


def test_sums_are_the_covariances():
    moments = Moments.of(X, Y)
    covariance = torch.cov(torch.cat([X, Y], 1).T, correction=0) * 60
    assert torch.allclose(moments.xx, covariance[:5, :5], atol=1e-11)
    assert torch.allclose(moments.xy, covariance[:5, 5:], atol=1e-11)
    assert torch.allclose(moments.yy, covariance[5:, 5:].diagonal(), atol=1e-11)


def test_updates_are_in_place_so_buffers_follow():
    buffers = Moments.zeros(5, 3).tensors()
    Moments(**buffers).update(X.float(), Y.bfloat16())
    assert buffers["n"] == 60
    assert close(Moments(**buffers), Moments.of(X.float(), Y.bfloat16()))
    assert all(value.dtype == torch.float64 for value in buffers.values())


def test_delta_columns_and_gap():
    x = X[:, :3]
    both = Moments.of(x, torch.cat([Y, x], 1))
    assert close(both.columns(0, 3), Moments.of(x, Y))
    assert close(both.columns(0, 3).delta(), Moments.of(x, Y - x), 1e-10)
    assert torch.allclose(both.columns(0, 3).gap(), (Y - x).square().sum(0))
    assert both.columns(3, 6).gap().abs().max() == 0  # equal states have no gap, not a rounding error
    with pytest.raises(FitError, match="width 3 and target width 6 differ"):
        both.delta()
