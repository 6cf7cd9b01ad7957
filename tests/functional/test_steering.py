import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.handles import auroc, minimal_k, principal_angles, random_basis
from mechdiff.functional.stats import generator
from mechdiff.functional.steering import (
    complete,
    difference_in_means,
    interchange,
    orthonormal,
    paired_svd,
    project_in,
    project_out,
    svd_around_direction,
    whitened_directions,
)

D = 24
EXACT = {"rtol": 0, "atol": 1e-12}


def gaussian(*shape, name="x"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def space(k, d=D, name="space"):
    return random_basis(k, d, generator(1, name, k))


H, OTHER = gaussian(40, D), gaussian(40, D, name="other")


# --- edits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, D])
def test_projections_are_projections(k):
    u, h = space(k), H
    inside = h - project_out(h, u)
    torch.testing.assert_close(inside - project_out(inside, u), inside, **EXACT)
    torch.testing.assert_close(project_out(h, u) @ u.mT, torch.zeros(40, k, dtype=h.dtype), **EXACT)
    torch.testing.assert_close(project_out(h, u) + inside, h, **EXACT)
    torch.testing.assert_close(project_in(h, u, 0.5), h + 0.5 * h @ u.mT @ u, **EXACT)
    torch.testing.assert_close(project_in(h, u, -1.0), project_out(h, u), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_rank_and_no_strength_change_no_bit(dtype):
    h = H.to(dtype)
    h[0, 0] = -0.0
    none, some = torch.zeros(0, D), space(3)
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for edited in (
        project_out(h, none),
        project_in(h, none),
        interchange(h, OTHER.to(dtype), none),
        project_in(h, some, 0.0),
        interchange(h, OTHER.to(dtype), some, 0.0),
    ):
        assert torch.equal(edited.view(bits), h.view(bits))


def test_full_rank_interchange_is_the_whole_patch():
    torch.testing.assert_close(interchange(H, OTHER, space(D)), OTHER, **EXACT)
    half = interchange(H, OTHER, space(3), 0.5)
    torch.testing.assert_close(interchange(half, OTHER, space(3)), interchange(H, OTHER, space(3)), **EXACT)


def test_interchange_leaves_the_rest_alone():
    u = space(3)
    moved = interchange(H, OTHER, u)
    torch.testing.assert_close(project_out(moved, u), project_out(H, u), **EXACT)
    torch.testing.assert_close(moved @ u.mT, OTHER @ u.mT, **EXACT)


def test_affine_ablation_keeps_the_neutral_mean():
    neutral, u = H + 5, space(4)
    center = neutral.mean(0)
    ablated = project_out(neutral, u, center)
    torch.testing.assert_close(ablated.mean(0), center, **EXACT)
    torch.testing.assert_close(ablated @ u.mT, (center @ u.mT).expand(40, -1), **EXACT)
    assert (project_out(neutral, u).mean(0) - center).norm() > 1


def test_half_precision_projects_in_single_and_rounds_last():
    h, u = H.bfloat16(), space(4)
    found = project_out(h, u)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, project_out(h.float(), u.float()).bfloat16())
    naive = h - (h @ u.bfloat16().mT) @ u.bfloat16()
    exact = project_out(h.double(), u)
    assert (found.double() - exact).norm() < 0.8 * (naive.double() - exact).norm()
    left = project_out(h.float(), u.float()) @ u.float().mT
    assert left.abs().max() < 1e-5


def test_a_basis_for_each_of_a_batch():
    h, bases = H.reshape(4, 10, D), torch.stack([space(2, name=str(i)) for i in range(4)])
    for together, alone in (
        (project_out(h, bases, OTHER[0]), lambda i: project_out(h[i], bases[i], OTHER[0])),
        (interchange(h, h.flip(0), bases, 0.3), lambda i: interchange(h[i], h.flip(0)[i], bases[i], 0.3)),
    ):
        torch.testing.assert_close(together, torch.stack([alone(i) for i in range(4)]), **EXACT)


@pytest.mark.parametrize("edit", [project_out, project_in, lambda h, u: interchange(h, h, u)])
def test_a_basis_that_is_not_orthonormal_is_refused(edit):
    skew = torch.cat([space(1), space(1) + 0.1 * space(2)[1:]])
    for basis, off in ((skew, "0.9|1"), (1.001 * space(2), "0.002"), (torch.full((2, D), torch.nan), "nan")):
        with pytest.raises(FitError, match=rf"off orthonormal by ({off}).*key: basis") as error:
            edit(H, basis)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [0, 4])
def test_ranks_that_do_not_exist(rows):
    with pytest.raises(FitError, match=rf"k is {rows}; allowed: 1 to 3.*key: handle"):
        orthonormal(torch.eye(4, 3)[:rows], "handle")
    for solver in (lambda k: paired_svd(H[:, :3], k), lambda k: svd_around_direction(H[0, :3], H[:, :3], k)):
        with pytest.raises(FitError, match=rf"k is {rows}; allowed: 1 to 3.*model\.k"):
            solver(rows)


# --- estimators ---------------------------------------------------------------------------------------------


def planted(rank, rows=200, noise=0.0):
    """Draw paired differences of `rank` topics, equally frequent, each writing its own direction."""
    directions = space(rank, name="planted")
    strength = 2 + gaussian(rows, name="strength").abs()
    change = strength[:, None] * directions[torch.arange(rows) % rank]
    return directions, change + noise * gaussian(rows, D)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_uncentred_svd_finds_a_planted_difference(rank):
    directions, change = planted(rank)
    found = paired_svd(change, rank)
    assert principal_angles(found.basis, directions).max() < 0.1
    assert found.energy[:rank].sum() == pytest.approx(1)
    torch.testing.assert_close(orthonormal(found.basis), found.basis)
    noisy = paired_svd(planted(rank, noise=0.02)[1], rank).basis
    assert principal_angles(noisy, directions).max() < 5


@pytest.mark.parametrize(("rank", "at_least"), [(1, 5), (2, 40), (4, 40)])
def test_directions_of_means_do_not_find_it(rank, at_least):
    directions, change = planted(rank)
    classes = 3 * gaussian(D, name="what tells the classes apart")  # in both models: no part of the change
    base = gaussian(200, D, name="base")
    direction = difference_in_means(base + classes + change, gaussian(200, D, name="neutral"))
    basis = svd_around_direction(direction, change, rank)
    assert principal_angles(basis, directions).max() > at_least


def test_centring_would_remove_a_constant_shift():
    direction = space(1)[0]
    change = 3 * direction + 0.1 * gaussian(100, D)
    assert principal_angles(paired_svd(change, 1).basis, direction[None]).max() < 5
    assert principal_angles(paired_svd(change - change.mean(0), 1).basis, direction[None]).max() > 20


def test_the_direction_comes_first_then_what_is_orthogonal_to_it():
    direction, rows = gaussian(D, name="direction"), gaussian(50, D) + 4
    basis = svd_around_direction(direction, rows, 5)
    unit = direction / direction.norm()
    torch.testing.assert_close(basis[0], unit, **EXACT)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(5, dtype=basis.dtype), **EXACT)
    rest = rows - torch.outer(rows @ unit, unit)
    assert principal_angles(basis[1:], paired_svd(rest, 4).basis).max() < 1e-6
    for k in range(1, 5):  # no other subspace around the direction captures more
        best = (rest @ basis[1 : k + 1].mT).square().sum()
        assert best >= (rest @ paired_svd(rows, k).basis.mT).square().sum() - 1e-9


def test_few_rows_are_completed():
    rows = gaussian(2, D)
    for basis in (paired_svd(rows, 6).basis, svd_around_direction(rows[0], rows, 6)):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(6, dtype=basis.dtype), **EXACT)
        assert project_out(rows, basis).abs().max() < 1e-10
    nothing = paired_svd(torch.zeros(5, D), 3)
    orthonormal(nothing.basis)
    assert nothing.energy.tolist() == [0] * 5
    assert torch.equal(complete(rows[:0], 3), complete(rows[:0], 3))


def test_whitening_prefers_what_scatters_little():
    cut = torch.linspace(0.1, 3, D, dtype=torch.float64)
    shift = gaussian(D, name="shift")
    a, b = gaussian(4000, D) * cut + shift, gaussian(4000, D, name="b") * cut
    found = whitened_directions(a, b, shrinkage=1e-6)
    expected = shift / cut.square()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    delta = difference_in_means(a, b)
    assert torch.cosine_similarity(whitened_directions(a, b, 1.0), delta, dim=0) == pytest.approx(1)
    assert auroc(torch.cat([a, b]) @ found, torch.arange(8000) < 4000) > auroc(
        torch.cat([a, b]) @ delta, torch.arange(8000) < 4000
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: difference_in_means(H[:0], H), "0 rows"),
        (lambda: difference_in_means(H, H[:, :3]), "width 24 and 3"),
        (lambda: svd_around_direction(torch.zeros(D), H, 2), "length 0"),
        (lambda: paired_svd(H[:0], 1), "0 rows"),
        (lambda: whitened_directions(H, OTHER, 0.0), r"model\.shrinkage"),
        (lambda: whitened_directions(H[:1], OTHER[:1]), "do not scatter"),
        (lambda: whitened_directions(H, H), "length 0"),
        (lambda: auroc(torch.ones(3), torch.ones(3)), "3 positives and 0 negatives"),
        (lambda: random_basis(4, 3, generator(0)), "1 to 3"),
        (lambda: random_basis(3, D, generator(0), H[:2]), "rank of the factor"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(FitError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --- handles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 1e-3, 30.0, 45.0, 89.999, 90.0])
def test_principal_angles_are_exact_at_both_ends(degrees):
    u = space(4)
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    tilted = torch.stack([turn.cos() * u[0] + turn.sin() * u[2], u[1]])
    found = principal_angles(u[:2], tilted)
    assert found.tolist() == pytest.approx([0.0, degrees], abs=1e-12, rel=1e-7)
    mixed = torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64) @ tilted  # the same span
    assert principal_angles(mixed, u[:2]).tolist() == pytest.approx(found.tolist(), abs=1e-7)


def test_principal_angles_of_other_ranks():
    u = space(5)
    assert principal_angles(u[:1], u).tolist() == pytest.approx([0.0], abs=1e-12)
    assert principal_angles(u, u[:2]).shape == (2,)
    assert principal_angles(u[:3], u[2:]).tolist() == pytest.approx([0, 90, 90], abs=1e-12)


def test_random_subspaces_are_isotropic_or_follow_a_covariance():
    draws, h = generator(3), gaussian(D, name="any")
    held = torch.stack([(random_basis(6, D, draws) @ h).square().sum() for _ in range(2000)]).mean()
    assert held / h.square().sum() == pytest.approx(6 / D, rel=0.05)
    factor = torch.diag(torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)) @ space(3)
    lines = torch.stack([random_basis(1, D, draws, factor)[0] for _ in range(500)])
    assert ((lines @ space(3)[0]).abs() > 0.8).double().mean() > 0.8
    assert project_out(lines, space(3)).abs().max() < 1e-12
    orthonormal(random_basis(3, D, draws, factor))


def test_minimal_k():
    assert minimal_k([1, 2, 4, 8], [0.1, 0.2, 0.2, 0.9], 0.2) == 2
    assert minimal_k([8, 1], [0.9, None], 0.9) == 8
    assert minimal_k([1], [0.1], 0.2) is None
    assert minimal_k([], [], 0.2) is None


def test_auroc_counts_pairs():
    scores, labels = gaussian(30).round(decimals=0), gaussian(30, name="label") > 0
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(float(torch.stack(pairs).double().mean()))
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels))
    assert auroc(scores * 0, labels) == 0.5
