"""Divergence: laws of similarity, layers proposed where states differ, and edits that replace."""

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.cka import linear_cka
from mechdiff.functional.selection import agree, largest, onset, rank_correlation
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules import Divergence
from mechdiff.modules.base import UNTOUCHED, similarity
from mechdiff.results import Results
from tests.modules.planted import PROMPTS, affine, planted, states, trainer, widths


def outcome(module, data):
    trainer().test(module, datamodule=data, verbose=False)
    return Results(module.records())


def scaled(x, site):
    """Leave the first site as it is, and change the others more the higher they are."""
    return x if site == 0 else x + site * affine(x, site).roll(1, 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    data = planted(tmp_path_factory.mktemp("stores"), scaled, sites=4, test_all=True, positions=["last"])
    module = Divergence(**widths(data), matrix=True)
    return data, module, outcome(module, data)


def test_every_prompt_is_tested(found):
    data, _, results = found
    curve = [r for r in results if "matrix" not in r.params and "centred" not in r.params]
    assert {r.n for r in curve} == {PROMPTS}
    assert {r.split for r in results} == {"all"}
    assert {r.positions for r in results} == {"last"}
    assert len({r.key for r in results}) == len(results) > 0
    data.setup("test")


def test_equal_states_have_no_divergence(found):
    *_, results = found
    for quantity in ("cka", "cka_debiased"):
        records = results.select(quantity=quantity, site="resid_post.0", source_site="resid_post.0")
        records = [r for r in records if "matrix" not in r.params]
        assert len(records) == 2
        for r in records:
            assert r.value == pytest.approx(1, abs=1e-9)
            assert (r.low, r.high) == pytest.approx((1, 1), abs=1e-6)


def test_values_are_those_of_the_definition(found):
    data, module, results = found
    batch = data.read(data.rows("test"))
    for site in data.sites:
        (r,) = [
            r
            for r in results.select(quantity="cka_debiased", site=site)
            if not {"matrix", "centred"} & set(r.params)
        ]
        plain = linear_cka(batch["source"][site], batch["target"][site], debiased=True)
        assert r.value == pytest.approx(plain.item(), abs=1e-9)
        assert r.low <= r.value <= r.high
    cross = results.select(quantity="cka_debiased", matrix=True)
    assert all(r.low <= r.value <= r.high for r in cross)
    assert len(cross) == len({(r.site, r.params["source_site"]) for r in cross}) == 16
    own = {r.site: r.value for r in cross if r.site == r.params["source_site"]}
    assert own == pytest.approx({s: 1 - d for s, d in module.ranking().items()}, abs=1e-9)


def test_the_two_most_different_layers_are_proposed(found):
    _, module, results = found
    chosen = results.select(quantity="chosen_layer")
    ranking = module.ranking()
    order = sorted(ranking, key=ranking.__getitem__, reverse=True)
    assert [r.site for r in chosen] == order[:2]
    assert [r.value for r in chosen] == [Site.parse(site).layer for site in order[:2]]
    assert [r.params["divergence"] for r in chosen] == [ranking[site] for site in order[:2]]
    assert {r.flags for r in chosen} == {("chosen_on_eval",)}  # all prompts were tested


def test_a_copy_proposes_nothing_worth_it(tmp_path):
    data = planted(tmp_path, lambda x, site: x, sites=3, test_all=True)
    results = outcome(Divergence(**widths(data)), data)
    assert {r.flags for r in results.select(quantity="chosen_layer")} == {("gap_too_small", "chosen_on_eval")}


@pytest.mark.parametrize("quantity", ["cka", "cka_debiased"])
def test_why_there_is_no_likeness_is_said(quantity):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    about = {"question": "rq1", "unit": "fraction", "n": 8}
    few = similarity(quantity, x, x, torch.arange(8), about, [f"class {i // 2}" for i in range(8)])
    flat = similarity(quantity, x, torch.ones(8, 3), torch.arange(8), about)
    assert (few.reason, flat.reason) == ("too_few_prompts", "no_variance")


def test_classes_that_differ_alike_count_only_when_pooled(tmp_path):
    """Languages that stand apart in both models look like likeness; within them there is none."""
    data = planted(tmp_path, lambda x, site: states(seed=99), sites=1, test_all=True, positions=["last"])
    module = Divergence(**widths(data))
    gap = 50.0 * torch.ones(12)

    class Two(Divergence):
        def test_step(self, batch, batch_idx):
            odd = (batch["prompt"] % 2).bool()
            sides = {
                side: {name: rows + odd[:, None] * gap for name, rows in batch[side].items()}
                for side in ("source", "target")
            }
            super().test_step({**batch, **sides}, batch_idx)

        def on_test_start(self):
            super().on_test_start()
            self._classes = ["kk/target" if i % 2 else "en/target" for i in range(PROMPTS)]

    results = outcome(Two(**module.hparams), data)
    pooled, within = results.select(quantity="cka_debiased")
    assert pooled.value > 0.9
    assert within.params["centred"] == "class+lang"
    assert within.low < 0.1 < 0.5 > within.value


def test_the_split_of_a_fit_is_the_default(tmp_path):
    data = planted(tmp_path, scaled)
    results = outcome(Divergence(**widths(data), positions=["last", "user"]), data)
    assert {r.split for r in results} == {"test"}
    assert {r.positions for r in results if r.quantity == "cka"} == {"last", "user"}
    assert max(r.n for r in results) < PROMPTS
    assert {r.positions for r in results.select(quantity="chosen_layer")} == {"last"}


def test_edits_replace_where_they_should():
    module, site = Divergence(["resid_post.1"]), Site(1)
    own, donor = torch.zeros(1, 4, 3), torch.ones(1, 4, 3)
    where = torch.tensor([[UNTOUCHED, POSITIONS.index("user"), UNTOUCHED, POSITIONS.index("last")]])
    (edit,) = module.edits({site: donor}, where, site=site, kind="raw").values()
    assert edit(own, where)[..., 0].tolist() == [[0, 1, 0, 1]]
    assert not own.any()
    assert module.edits(None, where, site=site, kind="self") == {}
    assert module.fitted
    assert not module.needs_fit
    assert module.ranking() == {}


@pytest.mark.parametrize("bad", [{"positions": ["first"]}, {"positions": []}, {"source_sites": ["a", "b"]}])
def test_bad_settings(bad):
    with pytest.raises(FitError, match=f"model.{next(iter(bad))}"):
        Divergence(["resid_post.1"], **bad)


def test_selection():
    assert largest([3.0, 1.0, 2.0], 2) == [0, 2]
    assert largest([], 2) == []
    assert onset([None, None]) is None
    assert onset([0.04, 0.06]) == 1
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert rank_correlation(x, [v**3 for v in x]) == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([0, 0], [1, 2]) == 0
    assert not agree([1, 2, 3, 4], [4, 3, 2, 1])
    assert not agree([1, 2, 3, 4], [3, 4, 1, 2])


def test_pwcca_stands_beside_that_of_shuffled_prompts(tmp_path):
    data = planted(tmp_path, scaled, sites=2, test_all=True, positions=["last"])
    results = outcome(Divergence(**widths(data), pwcca=True), data)
    for site in data.sites:
        (own,) = results.select(quantity="pwcca", site=site, control="none")
        (floor,) = results.select(quantity="pwcca", site=site, control="shuffled")
        assert own.n == floor.n == PROMPTS
        assert floor.value < own.low
        assert own.low <= own.value <= own.high
    (same,) = results.select(quantity="pwcca", site="resid_post.0", control="none")
    assert same.value == pytest.approx(1, abs=1e-6)
