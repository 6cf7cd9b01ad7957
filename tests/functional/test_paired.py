import math

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.paired import paired_difference
from mechdiff.functional.stats import generator


def table(both, only_first, only_second, neither):
    counts = (both, only_first, only_second, neither)
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    rows = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return zip(*rows, strict=True)


def test_without_correlation_wilson_arms_are_combined():
    first, second = table(10, 10, 10, 10)  # independent: ad = bc
    value, low, high, n = paired_difference(first, second)
    z2 = 1.959963985**2
    half = math.sqrt(z2) / (1 + z2 / 40) * math.sqrt(0.25 / 40 + z2 / (4 * 40**2))
    assert (value, n) == (0.0, 40)
    assert (low, high) == pytest.approx((-half * math.sqrt(2), half * math.sqrt(2)), abs=1e-9)


def test_agreement_narrows_and_disagreement_widens():
    width = [
        (lambda i: i.high - i.low)(paired_difference(*table(*cells)))
        for cells in ((20, 0, 0, 20), (10, 10, 10, 10), (0, 20, 20, 0))
    ]
    assert 0 < width[0] < width[1] < width[2]


def test_signs_change_with_the_order():
    first, second = (list(side) for side in table(3, 9, 2, 6))
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one == pytest.approx((-other.value, -other.high, -other.low, 20))


@pytest.mark.parametrize("cells", [(0.0, 0.05, 0.0, 0.95), (0.3, 0.3, 0.05, 0.35), (0.02, 0.02, 0.02, 0.94)])
def test_the_interval_covers_the_truth_often_enough(cells):
    probabilities, draws, n = torch.tensor(cells), generator(0, *cells), 40
    truth = cells[1] - cells[2]
    covered = 0
    for _ in range(400):
        picked = torch.multinomial(probabilities, n, replacement=True, generator=draws)
        interval = paired_difference((picked < 2).tolist(), (picked % 2 == 0).tolist())
        covered += interval.low <= truth <= interval.high
    assert covered / 400 > 0.92


def test_no_prompts():
    with pytest.raises(FitError, match="at least 1 prompt"):
        paired_difference([], [])
