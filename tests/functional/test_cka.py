import itertools

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional import hsic
from mechdiff.functional.cka import cka_contrast, cka_from_sums, cka_jackknife, linear_cka, standardize
from mechdiff.functional.moments import Moments
from mechdiff.functional.stats import generator, jackknife

SIZES = (1, 3, 2, 1, 2, 2, 4)


def gaussian(*shape, name="x"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def rotation(width):
    return torch.linalg.qr(gaussian(width, width, name="rotation")).Q


@pytest.fixture
def grouped():
    groups = torch.tensor([g for g, size in enumerate(SIZES) for _ in range(size)])
    groups = groups[torch.randperm(len(groups), generator=generator(0, "order"))]
    x = gaussian(len(groups), 3) + gaussian(len(SIZES), 3, name="prompt")[groups]
    return x, gaussian(len(groups), 4, name="y") + x[:, :1], groups


def u_statistic(x, y, groups):
    """Average over every choice of rows from distinct prompts, each prompt weighing the same."""
    k, m, g = x @ x.T, y @ y.T, groups.tolist()
    sums, weights = [0.0] * 3, [0.0] * 3
    for r in (2, 3, 4):
        for rows in itertools.permutations(range(len(g)), r):
            if len({g[i] for i in rows}) == r:
                weight = 1.0
                for i in rows:
                    weight /= g.count(g[i])
                i, j = rows[:2]
                other = {2: (i, j), 3: (i, rows[-1]), 4: rows[-2:]}[r]
                sums[r - 2] += weight * (k[i, j] * m[other]).item()
                weights[r - 2] += weight
    a, b, c = (s / w for s, w in zip(sums, weights, strict=True))
    return a + c - 2 * b


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_invariances(grouped, debiased, form):
    x, y, groups = grouped
    for labels in (None, groups):
        options = {"debiased": debiased, "groups": labels, "form": form}
        assert linear_cka(x, x, **options).item() == pytest.approx(1, abs=1e-12)
        moved = 7 * y @ rotation(4) + 30
        expected = linear_cka(x, y, **options).item()
        assert linear_cka(x, moved, **options).item() == pytest.approx(expected, abs=1e-12)
        assert linear_cka(y, x, **options).item() == pytest.approx(expected, abs=1e-12)
        order = torch.randperm(len(x), generator=generator(1))
        options["groups"] = None if labels is None else labels[order]
        assert linear_cka(x[order], y[order], **options).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_gram_form_is_feature_form(debiased):
    x, y = gaussian(40, 12), gaussian(40, 20, name="y")
    for groups in (None, torch.arange(40) // 3):
        gram, feature = (
            linear_cka(x, y, debiased=debiased, groups=groups, form=f) for f in ("gram", "feature")
        )
        assert gram.item() == pytest.approx(feature.item(), abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_rows_may_be_taken_some_at_a_time(grouped, debiased, form, monkeypatch):
    x, y, groups = grouped
    whole = cka_jackknife(x, y, debiased=debiased, groups=groups, form=form)
    monkeypatch.setattr(hsic, "_BLOCK", 4)
    assert len(x) > 3 * 4
    assert cka_jackknife(x, y, debiased=debiased, groups=groups, form=form) == pytest.approx(whole, abs=1e-12)


def test_the_callers_states_are_left_as_they_are():
    x, y = gaussian(20, 8) + 1, gaussian(20, 8, name="y") + 1
    before = x.clone(), y.clone()
    cka_jackknife(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_sums_give_the_value_of_the_rows():
    x, y = gaussian(40, 6) + 3, gaussian(40, 9, name="y") - 2
    parts = [Moments.zeros(6, 9), Moments.zeros(9, 9)]
    for rows in (slice(0, 7), slice(7, 40)):
        parts[0].update(x[rows], y[rows])
        parts[1].update(y[rows], y[rows])
    found = cka_from_sums(parts[0].xy, parts[0].xx, parts[1].xx)
    assert found.item() == pytest.approx(linear_cka(x, y).item(), abs=1e-12)
    with pytest.raises(FitError, match="does not vary"):
        cka_from_sums(parts[0].xy, torch.zeros(6, 6), parts[1].xx)


def test_biased_value_is_the_textbook_formula():
    x, y = gaussian(30, 5), gaussian(30, 7, name="y")
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y).item() == pytest.approx(expected.item(), abs=1e-14)


def test_debiased_value_is_song_et_al():
    def hsic(k, m):
        n = len(k)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        cross = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
        return ((k * m).sum() + cross) / (n * (n - 3))

    x, y = gaussian(30, 5) + 2, gaussian(30, 7, name="y")
    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    assert linear_cka(x, y, debiased=True).item() == pytest.approx(expected.item(), abs=1e-12)


def test_grouped_value_is_the_u_statistic_over_prompts(grouped):
    x, y, groups = grouped
    pairs = (x, y), (x, x), (y, y)
    xy, xx, yy = (u_statistic(*pair, groups) for pair in pairs)
    ours = linear_cka(x, y, debiased=True, groups=groups).item()
    assert ours == pytest.approx(xy / (xx * yy) ** 0.5, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_jackknife_is_the_loop_over_prompts(grouped, debiased, form):
    x, y, groups = grouped
    keeps = [groups != g for g in groups.unique()]
    looped = [linear_cka(x[k], y[k], debiased=debiased, groups=groups[k]) for k in keeps]
    full = linear_cka(x, y, debiased=debiased, groups=groups).item()
    expected = jackknife(torch.stack(looped), full)
    ours = cka_jackknife(x, y, debiased=debiased, groups=groups, form=form)
    assert ours == pytest.approx(expected, abs=1e-11)
    assert ours.n == len(SIZES)


@pytest.mark.parametrize(("n", "bias"), [(40, 0.99), (450, 0.90)])
def test_unrelated_wide_states_look_alike_only_to_the_biased_value(n, bias):
    x, y = (torch.randn(n, 4096, generator=generator(0, name)) for name in "xy")
    assert linear_cka(x, y).item() == pytest.approx(bias, abs=0.005)
    debiased = cka_jackknife(x, y)
    assert abs(debiased.value) < 0.06
    assert debiased.low < 0 < debiased.high


def test_rows_of_one_prompt_do_not_count_as_agreement():
    prompts = torch.arange(30).repeat_interleave(6)
    x = gaussian(30, 50)[prompts] + 0.1 * gaussian(180, 50, name="noise")
    y = gaussian(30, 50, name="y")[prompts] + 0.1 * gaussian(180, 50, name="more noise")
    assert linear_cka(x, y, debiased=True).item() > 0.3  # repeated rows pass for similarity
    assert abs(linear_cka(x, y, debiased=True, groups=prompts).item()) < 0.15


def test_half_precision_and_large_scales_are_safe():
    x = gaussian(20, 8)
    assert linear_cka(x.bfloat16(), x.bfloat16(), debiased=True).item() == pytest.approx(1, abs=1e-12)
    assert linear_cka(1e60 * x, 1e-60 * x).item() == pytest.approx(1, abs=1e-12)


def test_undefined_values_are_refused():
    x = gaussian(6, 3)
    with pytest.raises(FitError, match="target states do not vary"):
        linear_cka(x, torch.full((6, 3), 0.1))
    with pytest.raises(FitError, match="3 prompts is undefined; at least 4"):
        linear_cka(x, x, debiased=True, groups=torch.arange(6) // 2)
    with pytest.raises(FitError, match="at least 5"):
        cka_jackknife(x[:4], x[:4])


def test_standardize_undoes():
    x = torch.cat([gaussian(10, 3) * 5 + 2, torch.full((10, 1), 4.0, dtype=torch.float64)], 1)
    states, mean, scale = standardize(x)
    assert torch.allclose(states * scale + mean, x, atol=1e-12)
    assert torch.allclose(states[:, :3].std(0, correction=0), torch.ones(3, dtype=torch.float64))
    assert states[:, 3].abs().max() == 0
    assert standardize(x.bfloat16()).states.dtype == torch.float32


@pytest.mark.parametrize("debiased", [False, True])
def test_within_classes_is_the_mean_of_their_hsic(debiased):
    x, y = 5 * gaussian(24, 7), gaussian(24, 9, name="y")
    y[:, :7] += 0.2 * x
    x[::3] *= 3
    classes = torch.arange(24) % 3
    size = torch.tensor([8.0] * 3, dtype=torch.float64)

    def hsic(a, b):
        parts = [(a[classes == c], b[classes == c]) for c in range(3)]
        if debiased:
            each = [u_statistic(p, q, torch.arange(8)) for p, q in parts]
            return (size * torch.tensor(each, dtype=torch.float64)).sum()
        each = [(p - p.mean(0)).T @ (q - q.mean(0)) / len(p) for p, q in parts]
        return (size * torch.stack([e.square().sum() for e in each])).sum()

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    found = cka_jackknife(x, y, debiased=debiased, within=classes)
    assert found.value == pytest.approx(expected.item(), rel=1e-9)
    assert found.n == 24
    assert found.low < found.value < found.high
    same = cka_jackknife(x, 2 * x + 1, debiased=debiased, within=classes)
    assert tuple(same) == pytest.approx((1, 1, 1, 24), abs=1e-9)
    alone = cka_jackknife(x, y, debiased=debiased, within=["a"] * 24)
    assert tuple(alone) == pytest.approx(tuple(cka_jackknife(x, y, debiased=debiased)), rel=1e-9)


def test_within_classes_delete_one_is_the_loop():
    x, y = gaussian(18, 5), gaussian(18, 5, name="y") + gaussian(18, 5)
    classes = torch.arange(18) % 3
    found = cka_jackknife(x, y, within=classes)
    kept = [torch.arange(18) != i for i in range(18)]
    loop = [cka_jackknife(x[k], y[k], within=classes[k]).value for k in kept]
    loop = torch.tensor(loop, dtype=torch.float64)
    assert tuple(found) == pytest.approx(tuple(jackknife(loop, found.value)), rel=1e-9)


def test_what_tells_classes_apart_does_not_count_within_them():
    classes = torch.arange(60) % 2
    gap = 20.0 * classes[:, None]
    x, y = gaussian(60, 300) + gap, gaussian(60, 300, name="y") + gap
    assert cka_jackknife(x, y).value > 0.9
    within = cka_jackknife(x, y, within=classes)
    assert within.low < 0 < within.high
    with pytest.raises(FitError, match="within classes"):
        cka_jackknife(x, y, within=range(60))


@pytest.mark.parametrize("debiased", [False, True])
def test_a_contrast_is_the_loop_over_prompts(grouped, debiased):
    x, y, groups = grouped
    z = gaussian(len(x), 5, name="z") + y[:, :1]
    found = cka_contrast(x, z, y, debiased=debiased, groups=groups)

    def difference(rows):
        values = (linear_cka(s[rows], y[rows], debiased=debiased, groups=groups[rows]) for s in (x, z))
        return next(values).item() - next(values).item()

    without = [difference(groups != g) for g in groups.unique()]
    expected = jackknife(torch.tensor(without, dtype=torch.float64), difference(groups >= 0))
    assert found == pytest.approx(expected, abs=1e-9)
