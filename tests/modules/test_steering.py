import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mechdiff.data.contrast import ContrastPairs
from mechdiff.errors import CheckpointError, FitError
from mechdiff.functional.clt import fit_ridge
from mechdiff.functional.handles import principal_angles, random_basis
from mechdiff.functional.stats import generator
from mechdiff.functional.steering import interchange, orthonormal, paired_svd
from mechdiff.interventions.sites import Site
from mechdiff.modules import SteeringSubspace, SteeringSubspaceSGD
from mechdiff.modules.base import UNTOUCHED
from mechdiff.results import Results
from tests.modules.planted import ROWS, alternating, fitted, planted, trainer, widths

D = 12
SITE = "resid_post.0"
PROMPT = torch.arange(ROWS) // 8
TARGET = PROMPT % 2 == 1


def directions(rank):
    return random_basis(rank, D, generator(0, "planted", rank)).float()


def topics(rank, noise=0.0):
    """Return a change of target prompts: of `rank` topics, each writing its own direction."""

    def change(x, site):
        draws = generator(0, "strength", rank, site)
        size = 4 * (2 + torch.rand(ROWS, 1, generator=draws)) * TARGET[:, None]
        wrong = noise * torch.randn(ROWS, D, generator=draws)
        return x + size * directions(rank)[PROMPT // 2 % rank] + wrong

    return change


def stores(path, change, **options):
    return planted(path, change, label=alternating, kind=ContrastPairs, **options)


def closed(data, **options):
    return SteeringSubspace(**widths(data), **{"k": 4, **options})


def angle(a, b):
    return principal_angles(a, b).max().item()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stores(tmp_path_factory.mktemp("noisy"), topics(2, noise=0.3))


@pytest.fixture(scope="module")
def module(data):
    found = closed(data)
    found.tested = fitted(found, data)
    return found


# --- the fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_planted_rank_is_found_by_the_uncentred_svd_alone(tmp_path, rank):
    data = stores(tmp_path, topics(rank), sites=1)
    module = closed(data, k=rank)
    records = Results(fitted(module, data))
    assert angle(module.basis(SITE), directions(rank)) < 0.1
    assert angle(module.basis(SITE, "diff_mean_svd"), directions(rank)) > 5
    (share,) = records.select(quantity="energy_share", solver="paired_svd", k=rank)
    assert share.value == pytest.approx(1, abs=1e-6)
    (chance,) = records.select(quantity="energy_share", solver="isotropic", k=rank)
    assert chance.value == pytest.approx(rank / D, rel=0.5)
    assert chance.control == "random"


def test_buffers_are_those_of_the_training_rows(data, module):
    batch = data.read(data.rows("train"))
    target = batch["label"] == 1
    for site, name in enumerate(data.sites):
        base, tuned = batch["source"][name], batch["target"][name]
        change = (tuned - base)[target]
        assert angle(module.basis(name), paired_svd(change, 4).basis) < 1e-4
        delta = tuned[target].mean(0) - tuned[~target].mean(0)
        torch.testing.assert_close(module.delta[site], delta, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module.neutral_tuned[site], tuned[~target].mean(0), atol=1e-5, rtol=1e-4)
        lambda_ = module.recipe.lambdas[int(module.chosen[site])]
        expected = fit_ridge(base, tuned, lambda_, shrink="identity")
        torch.testing.assert_close(module.map_weight[site], expected.weight.float(), atol=1e-4, rtol=1e-3)
        covariance = torch.cov(base.T.double()).float()
        torch.testing.assert_close(
            module.factor[site].T @ module.factor[site], covariance, atol=1e-4, rtol=1e-3
        )
        assert (module.energy[site].diff() >= 0).all()
        for solver in module.solvers:
            basis = orthonormal(module.basis(name, solver))
            assert (basis @ delta >= -1e-4).all()
        assert torch.equal(module.basis(name, k=2), module.basis(name)[:2])
    assert module.fit_prompts.tolist() == [12, 12]


def test_the_models_may_be_contrasted_instead(data):
    module = closed(data, contrast="models", solver="diff_mean")
    fitted(module, data)
    batch = data.read(data.rows("train"))
    change = (batch["target"][SITE] - batch["source"][SITE])[batch["label"] == 1].mean(0)
    torch.testing.assert_close(module.delta[0], change, atol=1e-5, rtol=1e-4)
    assert module.basis(SITE).shape == (1, D)
    torch.testing.assert_close(module.basis(SITE)[0] * change.norm(), change, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("contrast", ["classes", "models"])
def test_models_without_a_difference(tmp_path, contrast):
    data = stores(tmp_path, lambda x, _: x.clone(), sites=1)
    module = closed(data, contrast=contrast)
    records = Results(fitted(module, data))
    shares = records.select(quantity="energy_share")
    assert {(r.value, r.reason) for r in shares} == {(None, "gap_too_small")}
    for solver in module.solvers:
        orthonormal(module.basis(SITE, solver))
    h = torch.randn(5, D, generator=generator(0))
    assert torch.equal(module.change(SITE, "interchange", h, h), h)
    assert torch.allclose(module.change(SITE, "mapped", h), h, atol=1e-5)
    if contrast == "models":
        assert torch.equal(module.change(SITE, "add", h), h)


def test_records(data, module):
    records = Results(module.tested)
    keys = [r.key for r in records]
    assert len(set(keys)) == len(keys)
    for r in records.select(quantity="energy_share"):
        assert 0 <= r.low <= r.value <= r.high <= 1 + 1e-9
        assert (r.n, r.rows, r.split, r.unit) == (4, 4, "test", "fraction")
        assert (r.control == "random") == (r.params["solver"] in ("isotropic", "covariance"))
    for solver in ("paired_svd", "diff_mean_svd", "isotropic", "covariance"):
        curve = [
            records.select(quantity="energy_share", solver=solver, k=k, site=SITE)[0].value
            for k in (1, 2, 3, 4)
        ]
        assert curve == sorted(curve)
    found = records.select(quantity="principal_angle", solver="diff_mean_svd", site=SITE)
    assert [r.params["rank"] for r in found] == [1, 2, 3, 4]
    assert [r.value for r in found] == sorted(r.value for r in found)
    assert {r.n for r in found} == {12}
    assert len(records.select(quantity="principal_angle", solver="whitened", site=SITE)) == 1


def test_a_checkpoint_gives_the_same_records(tmp_path, data, module):
    runner = trainer()
    runner.fit(first := closed(data), datamodule=data)
    path = tmp_path / "fitted.ckpt"
    runner.save_checkpoint(path)
    again = closed(data)
    trainer().test(again, datamodule=data, ckpt_path=str(path), weights_only=True, verbose=False)
    assert list(again.records()) == module.tested
    loaded = SteeringSubspace.load_from_checkpoint(path, weights_only=True)
    for name, part in first.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], part)
    for change in (
        {"k": 3},
        {"contrast": "models"},
        {"compare": ()},
        {"solver": "diff_mean_svd", "compare": ("paired_svd", "diff_mean", "whitened")},
        {"sites": data.sites[::-1]},
        {"sites": data.sites[:1]},
    ):
        other = SteeringSubspace(**{**widths(data), "k": 4, **change})
        with pytest.raises(CheckpointError, match="ckpt_path"):
            trainer().test(other, datamodule=data, ckpt_path=str(path), weights_only=True)


def test_epochs_and_batches_change_nothing(data, module):
    twice, small = closed(data), closed(data)
    fitted(twice, data, max_epochs=2)
    data.batch_size = 5
    fitted(small, data)
    data.batch_size = 64
    for other in (twice, small):
        for name, part in module.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], part, atol=1e-4, rtol=1e-3)


def test_nothing_fitted_is_not_tested(data):
    with pytest.raises(CheckpointError, match="--ckpt_path"):
        trainer().test(closed(data), datamodule=data)


# --- edits --------------------------------------------------------------------------------------------------


def states(*shape, name="h", dtype=torch.float32):
    return torch.randn(*shape, D, generator=generator(5, name)).to(dtype)


@pytest.mark.parametrize("kind", ["add", "interchange", "mapped", "amplify", "ablate", "reverse", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_strength_and_no_rank_change_no_bit(module, kind, dtype):
    h, donor = states(3, 4, dtype=dtype), states(3, 4, name="donor", dtype=dtype)
    assert torch.equal(module.change(SITE, kind, h, donor, alpha=0.0), h)
    assert torch.equal(module.change(SITE, kind, h, donor, basis=torch.zeros(0, D)), h)
    where = torch.zeros(3, 4, dtype=torch.int64)
    assert module.edits({Site(0): donor}, where, site=SITE, kind=kind, k=1, alpha=0.0) == {}
    changed = module.change(SITE, kind, h, donor)
    assert changed.dtype == dtype
    assert changed.shape == h.shape
    assert torch.equal(changed, h) == (kind == "none")


def test_each_kind_is_its_formula(module):
    h, donor, u = states(6), states(6, name="donor"), module.basis(SITE, k=3)
    delta, p = module.delta[0], u.T @ u
    mapped = h @ module.map_weight[0] + module.map_bias[0]
    line = module.basis(SITE, k=1)
    for kind, alpha, expected in (
        ("interchange", 0.5, h + 0.5 * (donor - h) @ p),
        ("reverse", 1.0, h + (donor - h) @ p),
        ("mapped", 2.0, h + 2 * (mapped - h) @ p),
        ("amplify", 3.0, h + 3 * h @ p),
        ("ablate", 1.0, h - (h - module.neutral_tuned[0]) @ p),
    ):
        torch.testing.assert_close(module.change(SITE, kind, h, donor, basis=u, alpha=alpha), expected)
    torch.testing.assert_close(module.change(SITE, "add", h, alpha=0.25), h + 0.25 * delta)
    torch.testing.assert_close(module.change(SITE, "add", h, basis=line), h + delta.norm() * line[0])
    own = module.basis(SITE, "diff_mean")
    torch.testing.assert_close(module.change(SITE, "add", h, basis=own), h + delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(h), h @ module.basis(SITE).T @ module.basis(SITE))


def test_the_whole_interchange_is_the_donor_and_bases_may_differ_by_row(module):
    h, donor = states(3, 4), states(3, 4, name="donor")
    whole = module.change(SITE, "interchange", h, donor, basis=torch.eye(D))
    torch.testing.assert_close(whole, donor)
    bases = torch.stack([directions(1), directions(2)[:1], directions(4)[:1]])
    for kind in ("add", "interchange", "mapped", "amplify", "ablate"):
        found = module.change(SITE, kind, h, donor, basis=bases)
        alone = [module.change(SITE, kind, h[i], donor[i], basis=bases[i]) for i in range(3)]
        torch.testing.assert_close(found, torch.stack(alone))


def test_ablation_keeps_the_neutral_mean(data, module):
    batch = data.read(data.rows("train"))
    neutral = batch["target"][SITE][batch["label"] == 0]
    torch.testing.assert_close(
        module.change(SITE, "ablate", neutral).mean(0), neutral.mean(0), atol=1e-5, rtol=0
    )


def test_edits_act_where_they_are_wanted(module):
    h, donor = states(2, 5), states(2, 5, name="donor")
    where = torch.full((2, 5), UNTOUCHED)
    where[0, 4] = where[1, 2] = 0
    edits = module.edits({Site(0): donor}, where, site=SITE, kind="interchange", k=2, alpha=0.5)
    (edit,) = edits.values()
    found, kept = edit(h, torch.arange(5).expand(2, 5)), h.clone()
    assert torch.equal(found[where == UNTOUCHED], h[where == UNTOUCHED])
    expected = interchange(h[0, 4], donor[0, 4], module.basis(SITE, k=2), 0.5)
    torch.testing.assert_close(found[0, 4], expected)
    assert torch.equal(h, kept)
    given = module.edits(None, where, site=Site(1), kind="amplify", basis=directions(2), alpha=1.0)[Site(1)]
    torch.testing.assert_close(
        given(h, where)[1, 2], module.change(Site(1), "amplify", h[1, 2], basis=directions(2))
    )
    plain = module.edits(None, where, site=SITE, kind="add", alpha=1.0)[Site(0)]
    torch.testing.assert_close(plain(h, where)[0, 4], h[0, 4] + module.delta[0])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"kind": "add", "k": 2}, "k is 2 with kind add; allowed: 1"),
        ({"kind": "push"}, "kind is 'push'; allowed: add, "),
        ({"kind": "ablate", "alpha": 0.5}, "alpha is 0.5 with kind ablate; allowed: 1"),
        ({"kind": "amplify", "k": 5}, "k is 5 with solver paired_svd; allowed: 1 to 4"),
        ({"kind": "amplify", "solver": "whitened", "k": 2}, "k is 2 with solver whitened; allowed: 1 to 1"),
        ({"kind": "amplify", "solver": "pca"}, "solver is 'pca'"),
        ({"kind": "amplify", "site": "resid_post.7"}, "site is resid_post.7; allowed: resid_post.0, "),
        ({"kind": "amplify", "basis": 2 * torch.eye(D)[:2]}, "off orthonormal by 3"),
    ],
)
def test_cells_that_do_not_exist(module, cell, message):
    with pytest.raises(FitError, match=message) as error:
        module.edits(None, torch.zeros(1, 2), **{"site": SITE, **cell})
    assert "\n" not in str(error.value)
    assert "(key: " in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k is 0; allowed: 1 to 4.*model\.k"),
        ({"k": 5}, r"k is 5; allowed: 1 to 4.*model\.k"),
        ({"d_source": 3}, "width 3 and target width 4"),
        ({"solver": "pca"}, r"model\.solver has 'pca'"),
        ({"compare": ("pca",)}, r"model\.compare has 'pca'"),
        ({"contrast": "sites"}, r"model\.contrast has 'sites'"),
        ({"shrinkage": 0.0}, r"model\.shrinkage is 0"),
        ({"lambdas": (math.nan,)}, r"model\.lambdas"),
        ({"positions": ("first",)}, r"model\.positions"),
        ({"source_sites": [SITE] * 3}, r"model\.source_sites"),
    ],
)
def test_bad_settings_name_their_key(options, message):
    for kind in [SteeringSubspace] + [SteeringSubspaceSGD] * ("solver" not in options):
        with pytest.raises(FitError, match=message) as error:
            kind([SITE], **{"d_source": 4, "d_target": 4, "k": 2, **options})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"model\.loss is 'hinge'; allowed: contrast, causal"),
        ({"penalty": -1.0}, r"model\.penalty is -1"),
        ({"learning_rate": math.nan}, r"model\.learning_rate nan"),
    ],
)
def test_bad_settings_of_a_descent(options, message):
    with pytest.raises(FitError, match=message):
        SteeringSubspaceSGD([SITE], d_source=4, d_target=4, k=2, **options)


# --- descent ------------------------------------------------------------------------------------------------


def descending(data, **options):
    return SteeringSubspaceSGD(**widths(data), **{"k": 2, "learning_rate": 0.05, **options})


def test_descent_starts_at_the_closed_form_and_stays_orthonormal(data):
    still, moved = descending(data, learning_rate=0.0), descending(data, penalty=0.0)
    torch.manual_seed(1)
    fitted(still, data)
    fitted(moved, data, max_epochs=5)
    torch.manual_seed(2)
    fitted(again := descending(data, penalty=0.0), data, max_epochs=5)
    assert torch.equal(again.basis_sgd, moved.basis_sgd)  # whatever the global generator says
    exact = closed(data, k=2)
    fitted(exact, data)
    torch.testing.assert_close(still.basis(SITE), exact.basis(SITE), atol=1e-5, rtol=0)
    assert (orthonormal(moved.basis(SITE)) - still.basis(SITE)).abs().max() > 1e-4
    assert torch.equal(moved.basis(SITE, "paired_svd"), exact.basis(SITE))


def test_a_penalty_turns_the_subspace_away_from_what_neutral_prompts_share(tmp_path):
    def change(x, _):
        wide, narrow = 3 * directions(2)[0], 2 * directions(2)[1]
        return x + wide + TARGET[:, None] * narrow  # the stronger direction is in every prompt

    data = stores(tmp_path, change, sites=1)
    free, held = descending(data, k=1, penalty=0.0), descending(data, k=1, penalty=10.0)
    for module in (free, held):
        fitted(module, data, max_epochs=60)
    assert (free.basis(SITE) @ directions(2)[0]).abs() > 0.8
    assert (held.basis(SITE) @ directions(2)[0]).abs() < 0.3


def test_a_scorer_teaches_the_subspace(tmp_path):
    data = stores(tmp_path, topics(2, noise=0.3), sites=1)
    wanted = torch.eye(D)[3]

    def scorer(site, basis, batch):
        assert site == SITE
        assert set(batch) >= {"source", "target", "label"}
        return 1 - (basis @ wanted).square().sum()

    module = descending(data, loss="causal")
    with pytest.raises(FitError, match="causal without a scorer"):
        fitted(module, data)
    module.attach_scorer(scorer)
    fitted(module, data, max_epochs=60)
    assert (module.basis(SITE) @ wanted).norm() > 0.99
    with pytest.raises(AssertionError, match="never a child"):
        module.attach_scorer(torch.nn.Linear(2, 2))


def test_a_loss_that_is_not_finite_stops_the_fit_and_leaves_the_last_checkpoint(tmp_path, data):
    module = descending(data, loss="causal")
    module.attach_scorer(lambda site, basis, batch: basis.sum() * (math.nan if module.current_epoch else 1.0))
    keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
    with pytest.raises(FitError, match=r"loss is nan at step \d+.*learning_rate") as error:
        fitted(module, data, max_epochs=3, callbacks=[keep], enable_checkpointing=True)
    assert "\n" not in str(error.value)
    kept = SteeringSubspaceSGD.load_from_checkpoint(keep.last_model_path, weights_only=True)
    assert all(part.isfinite().all() for part in kept.state_dict().values())
    orthonormal(kept.basis(SITE))


def test_resuming_equals_going_on(tmp_path, data):
    whole, first, rest = (descending(data) for _ in range(3))
    records = fitted(whole, data, max_epochs=4)
    runner = trainer(max_epochs=2)
    runner.fit(first, datamodule=data)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    runner = trainer(max_epochs=4)
    runner.fit(rest, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for name, part in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], part)
    runner.test(rest, datamodule=data, verbose=False)
    assert list(rest.records()) == records
    with pytest.raises(CheckpointError, match="class"):
        trainer().test(
            closed(data, k=2), datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True
        )


@pytest.mark.parametrize("kind", [SteeringSubspace, SteeringSubspaceSGD])
def test_it_can_be_tried_out_without_memory(kind):
    with torch.device("meta"):
        kind(["resid_post.1"], d_source=16, d_target=16)


def test_the_causal_loss_takes_one_process(monkeypatch):
    module = SteeringSubspaceSGD([SITE], d_source=4, d_target=4, k=2, loss="causal")
    monkeypatch.setattr(SteeringSubspaceSGD, "trainer", SimpleNamespace(world_size=2))
    with pytest.raises(FitError, match=r"gives 2 processes; allowed with model.loss causal: 1"):
        module.setup("fit")
