"""What TensorBoard reads back is what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mechdiff.data.manifest import Example
from mechdiff.data.store import ActivationStore, Rows
from mechdiff.interventions.sites import SUFFIX, USER, Site
from mechdiff.reporting.curves import PAGES, curves
from mechdiff.reporting.hyperparameters import COLUMNS, HEADLINES, MORE, headlines
from mechdiff.reporting.projector import components, log_states, spoken_of
from mechdiff.reporting.tensorboard import log_results, tagged
from mechdiff.results import Record, Results
from tests.reporting.events import check_layout, columns, read, started, states_of
from tests.reporting.make import divergence_run, map_run
from tests.reporting.make_heads import head_run
from tests.reporting.make_steering import steering_run

TAG = "resid_post.19/r2_delta/last"


@pytest.mark.parametrize("kind", ["lightning", "writer"])
def test_scalars_figures_curves_and_hyperparameters(kind: str, tmp_path: Path) -> None:
    results = map_run([12, 19])
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    logger.log_hyperparams({"solver": "ridge", "positions": ["last", "user"], "rank": None, "lambdas": [1.0]})
    figures = {name: Figure() for name in ("clt", "patch")}
    log_results(logger if kind == "lightning" else SummaryWriter(str(tmp_path)), results, figures, step=3)
    events = read(tmp_path)
    (r,) = results.select(quantity="r2_delta", site="resid_post.19", positions="last", control="none")
    scalars = events.Scalars(TAG)
    assert [(s.step, round(s.value, 5)) for s in scalars] == [(3, round(r.value, 5))]
    names = events.Tags()["scalars"]
    assert "resid_post.19/kl_mapped/last/wrong_layer" in names
    assert "resid_post.12/r2_delta/last" not in names, "the gap is too small"
    groups = {name.partition("/")[0] for name in names}
    assert groups == {"resid_post.12", "resid_post.19", "by_layer", "ends", "headline"}
    assert {"figures/clt", "figures/patch"} == set(events.Tags()["images"])
    for tag, of in (("by_layer/rq2/resid_post/kl_raw/last", "value"), ("ends/{}/low", "low")):
        curve = events.Scalars(tag.format("by_layer/rq2/resid_post/kl_raw/last"))
        want = results.select(quantity="kl_raw", positions="last", control="none")
        assert [(s.step, s.value) for s in curve] == [
            (layer, pytest.approx(getattr(r, of))) for layer, r in zip((12, 19), want, strict=True)
        ]
    assert started(events)["pair"] == "cultural_smol"
    assert started(events)["solver"] == "ridge"
    assert started(events)["prompts"] == 131
    assert started(events)["seed"] == 17
    assert started(events).get("positions") == ("last, user" if kind == "lightning" else None)
    assert not {"rank", "lambdas", "k"} & started(events).keys()
    assert [s.value for s in events.Scalars("headline/r2_delta")] == [pytest.approx(r.value)]
    assert [s.value for s in events.Scalars("headline/r2_delta/low")] == [pytest.approx(r.low)]


RUNS = {
    "rq1": (divergence_run, [[0, 2, 4, 6]]),
    "rq2": (map_run, [[6, 12, 18]]),
    "rq3": (steering_run, []),
    "rq4": (head_run, []),
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EventAccumulator]:
    """Return what was logged of a run of each question."""
    root = tmp_path_factory.mktemp("runs")
    for question, (make, args) in RUNS.items():
        log_results(SummaryWriter(str(root / question)), make(*args), {})
    return {question: read(root / question) for question in RUNS}


def test_every_run_names_the_columns_of_all_questions(logged: dict[str, EventAccumulator]) -> None:
    for question, events in logged.items():
        names, metrics = columns(events)
        assert names == [*COLUMNS, *MORE]
        assert metrics == [f"headline/{name}" for name in HEADLINES]
        own = {f"headline/{name}" for name, (asked, *_) in HEADLINES.items() if asked == question}
        held = {tag for tag in metrics if tag in events.Tags()["scalars"]}
        assert held, f"{question} has a headline"
        assert held <= own
        assert started(events)["question"] == question


def test_the_custom_layout_has_a_page_for_every_question(logged: dict[str, EventAccumulator]) -> None:
    titles: dict[str, list[str]] = {}
    for events in logged.values():
        titles |= check_layout(events)
    assert list(titles) == list(PAGES)
    by_k = "\n".join(titles["RQ3 against k: effect of a handle"])
    assert "interchange_recovery, last, edit=interchange, 95 % interval" in by_k
    assert "interchange_recovery, last, edit=interchange, beside its controls" in by_k
    assert any("kl_raw and kl_mapped" in t for t in titles["RQ2 by layer: KL, what a patched state costs"])


def test_a_curve_over_k_has_the_strength_chosen_for_each_k() -> None:
    def cell(k: int, alpha: float, value: float, **more: object) -> Record:
        about = {"site": "resid_post.3", "split": "eval", "positions": "last", "unit": "fraction"}
        params = {"edit": "interchange", "k": k, "alpha": alpha}
        return Record("rq3", "interchange_recovery", value, 9, **{**about, "params": params, **more})

    records = [cell(1, 0.5, 0.1), cell(4, 2.0, 0.4), cell(4, 2.0, 0.05, control="random")]
    records += [cell(1, 1.0, 0.3, split="dev"), cell(1, 2.0, 0.3, split="dev")]
    own, random = curves(Results(records), "rq3", "interchange_recovery", "k")
    assert {k: r.value for k, r in own.points.items()} == {1: 0.1, 4: 0.4}
    assert own.tag == "by_k/rq3/interchange_recovery/last"
    assert random.tag == "by_k/rq3/interchange_recovery/last/random"
    assert random.belongs_to(own.cell)


def test_a_control_stands_beside_what_it_is_a_control_of() -> None:
    def cell(edit: str, control: str = "none", **more: object) -> Record:
        about = {"split": "eval", "positions": "last", "unit": "fraction", "control": control}
        params = {"edit": edit, "k": 1, "solver": control, **more}
        return Record("rq3", "interchange_recovery", 0.1, 9, site="resid_post.3", **about, params=params)

    records = [cell("interchange"), cell("mapped"), cell("interchange", "random"), cell("mapped", "shuffled")]
    found = curves(Results(records), "rq3", "interchange_recovery", "k")
    interchange, mapped, random, shuffled = found
    beside = {one.tag: [c for c in found if c.belongs_to(one.cell)] for one in (interchange, mapped)}
    assert beside == {interchange.tag: [interchange, random], mapped.tag: [mapped, shuffled]}


def test_two_sites_are_two_curves_over_k_and_a_matrix_is_none_over_layers() -> None:
    about = {"question": "rq3", "n": 9, "unit": "fraction", "split": "eval"}
    sites = [
        Record(quantity="steer_effect", value=0.1, site=f"resid_post.{i}", params={"k": 1}, **about)
        for i in (1, 2)
    ]
    found = curves(Results(sites), "rq3", "steer_effect", "k")
    assert [c.tag.rpartition("/")[2] for c in found] == ["site=resid_post.1", "site=resid_post.2"]
    (curve,) = curves(divergence_run([0, 2, 4]), "rq1", "cka_debiased", "layer")[:1]
    assert sorted(curve.points) == [0, 2, 4]
    assert not any("matrix" in r.params for r in curve.points.values())


def test_headlines_are_the_numbers_of_the_report() -> None:
    results = divergence_run([0, 2, 4, 6])
    (layer,) = results.select(quantity="chosen_layer", by="cka_debiased", rank=1)
    assert headlines(results)["layer"] == layer
    assert headlines(results)["patch_recovery"].site == layer.site
    assert headlines(Results([])) == {}


class Held(ActivationStore):
    """A store in memory, of one token of text and two of a template for each prompt."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states, n = states, len(states)
        self.examples = [
            Example(f"p{i}", "en", "target" if i % 2 else "neutral", f"s{i}", "t0") for i in range(n)
        ]
        self.sites, self.suffix = [Site(2)], [b"a", b"b"]
        example = torch.arange(n).flip(0).repeat_interleave(3)
        self.rows = Rows(
            example,
            torch.tensor([USER, SUFFIX, SUFFIX]).repeat(n),
            torch.tensor([4, -2, -1]).repeat(n),
            torch.tensor([1, 2, 3]).repeat(n),
        )

    def read(self, site: Site | str, rows: torch.Tensor | None = None) -> torch.Tensor:
        assert rows is not None
        return self.states[self.rows.example[rows]]


PROPOSED = Results(
    [
        Record(
            "rq1",
            "chosen_layer",
            2,
            9,
            "layer",
            site="resid_post.2",
            params={"by": "cka_debiased", "rank": 1},
        ),
    ]
)


def test_the_projector_shows_both_models_by_class(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    states = {
        role: torch.randn(6, 5, generator=draws) + shift for role, shift in (("source", 0), ("target", 3))
    }
    with SummaryWriter(str(tmp_path)) as writer:
        log_states(writer, PROPOSED, {role: Held(part) for role, part in states.items()})
    ((name, (shown, known)),) = states_of(tmp_path).items()
    assert name == "resid_post.2"
    assert [row[:3] for row in known[:2]] == [
        ["neutral, base", "neutral", "base"],
        ["target, base", "target", "base"],
    ]
    assert [row[-1] for row in known] == [f"p{i}" for i in range(6)] * 2
    assert {row[0] for row in known} == {
        f"{c}, {m}" for c in ("target", "neutral") for m in ("base", "tuned")
    }
    whole = torch.cat([states["source"], states["target"]])
    assert torch.allclose(torch.cdist(shown, shown), torch.cdist(whole, whole), atol=0.02)


def test_the_projector_has_at_most_as_many_rows_as_it_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdiff.reporting.projector.ROWS", 8)
    states = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    with SummaryWriter(str(tmp_path)) as writer:
        log_states(writer, PROPOSED, {"source": Held(states), "target": Held(states[:, :3])})
    tables = states_of(tmp_path)
    assert set(tables) == {"resid_post.2.base", "resid_post.2.tuned"}, "their widths differ"
    one, other = tables.values()
    assert len(one[0]) == len(other[0]) == 4
    assert [row[-1] for row in one[1]] == [row[-1] for row in other[1]]


def test_without_states_there_is_no_projector(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        log_states(writer, PROPOSED, {})
        log_states(writer, head_run(), {"source": Held(torch.zeros(2, 2))})
    assert not (tmp_path / "projector_config.pbtxt").exists()
    assert spoken_of(steering_run()) == ["resid_post.21"]
    assert spoken_of(map_run([6, 12])) == ["resid_post.6", "resid_post.12"]


def test_components_keep_distances_and_write_short() -> None:
    states = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)) * 700 + 40
    found = components(states, 12)
    assert torch.allclose(torch.cdist(found, found), torch.cdist(states, states).double(), atol=5)
    assert components(states, 3).shape == (30, 3)
    assert max(len(repr(float(x))) for x in found.flatten()) <= 8
    assert torch.equal(components(torch.ones(4, 2)), torch.zeros(4, 2, dtype=torch.float64))


def test_no_logger_or_a_dummy_logs_nothing(tmp_path: Path) -> None:
    log_results(None, map_run([3]), {})
    log_results(DummyLogger(), map_run([3]), {})


def test_another_logger_receives_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    log_results(logger, map_run([19]), {}, step=2)
    logger.save()
    assert TAG in (tmp_path / "metrics.csv").read_text()


def test_tags_tell_records_apart_by_what_differs() -> None:
    record = {"question": "rq3", "quantity": "steer_effect", "value": 0.1, "n": 4, "unit": "pp"}
    records = [Record(**record, params={"k": k, "alpha": 1.0}) for k in (1, 2)]
    records.append(Record(**record, params={"k": 2, "alpha": 1.0}, split="dev", model="tuned"))
    assert list(tagged(Results(records))) == [
        "model/steer_effect/k=1",
        "model/steer_effect/k=2",
        "model/steer_effect/tuned",
    ]


def test_a_line_has_one_name_at_all_layers() -> None:
    about = {"question": "rq1", "quantity": "patch_recovery", "value": 0.1, "n": 4, "unit": "fraction"}
    records = [
        Record(**about, site=f"resid_post.{i}", params={"prompts": which})
        for i, kinds in ((1, ["curve"]), (2, ["curve", "all"]))
        for which in kinds
    ]
    assert list(tagged(Results(records))) == [
        "resid_post.1/patch_recovery/prompts=curve",
        "resid_post.2/patch_recovery/prompts=curve",
        "resid_post.2/patch_recovery/prompts=all",
    ]
