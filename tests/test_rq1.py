"""Where do two models differ: the command as a user runs it, and its layers in a run downstream."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechdiff.errors import PromptError
from mechdiff.prepare import fitting
from mechdiff.reporting.hyperparameters import headlines
from mechdiff.results import Results, handed_on
from tests.callbacks.pairs import pair
from tests.reporting.events import check_layout, read, started, states_of
from tests.toys import loaded, prompts
from tests.workspace import config, run, workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    return folder


def options(place: Path, root: Path) -> list[str]:
    return [
        f"--pair={place / 'pair.yaml'}",
        "--data.tokens=null",
        "--trainer.accelerator=cpu",
        f"--extraction.root={root / 'stores'}",
        f"--trainer.logger.save_dir={root / 'runs'}",
    ]


@pytest.fixture(scope="module")
def measured(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real run."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("measured")
    assert run("test", *config("rq1_cultural"), *options(place, root), "--model.matrix=true") == 0
    (folder,) = (root / "runs" / "rq1_cultural").iterdir()
    return folder


def test_a_run_answers_the_question_and_leaves_its_parts(measured: Path) -> None:
    results = Results.read(measured / "results.json")
    assert {r.question for r in results} == {"rq1"}
    assert {r.quantity for r in results} >= {
        "refusal_rate",
        "refusal_logodds",
        "cka",
        "cka_debiased",
        "patch_kl",
        "patch_recovery",
        "patch_increment",
        "patch_effect",
        "patch_onset",
        "chosen_layer",
        "graft_recovery",
        "weight_change",
        "interpolation_kl",
        "coverage",
    }
    assert {r.site for r in results.select(quantity="cka", split="all")} == {"resid_post.0", "resid_post.2"}
    told = results.provenance["benchmarks"]
    assert set(told) == set(results.provenance["pair"]["benchmarks"])
    assert all(b["revision"] is None and len(b["digest"]) == 16 for b in told.values())  # local files
    figures = {"divergence.png", "divergence_matrix.png", "layer_patch.png", "behaviour.png", "grafts.png"}
    assert {p.name for p in (measured / "figures").iterdir()} == figures
    assert (measured / "items.parquet").is_file()
    assert (measured / "config.yaml").is_file()
    assert not (measured / "checkpoints").exists()


def test_tensorboard_has_its_curves_its_headlines_and_states_of_both_models(measured: Path) -> None:
    events, results = read(measured), Results.read(measured / "results.json")
    tags = events.Tags()
    assert {"resid_post.0", "resid_post.2", "by_layer", "model"} <= {
        t.partition("/")[0] for t in tags["scalars"]
    }
    assert set(tags["images"]) == {f"figures/{path.stem}" for path in (measured / "figures").iterdir()}
    assert any("patch_recovery" in title for titles in check_layout(events).values() for title in titles)
    assert (started(events)["pair"], started(events)["question"]) == ("tiny", "rq1")
    for name, record in headlines(results).items():
        (scalar,) = events.Scalars(f"headline/{name}")
        assert scalar.value == pytest.approx(record.value)
    tables = states_of(measured)
    assert set(tables) == {r.site for r in handed_on(results)}
    for states, known in tables.values():
        assert {row[0] for row in known} == {
            f"{c}, {m}" for c in ("target", "neutral") for m in ("base", "tuned")
        }
        assert len(states) == len(known) == 2 * len({row[-1] for row in known})


@pytest.mark.parametrize(("flags", "by"), [([], "cka_debiased"), (["rankings_disagree"], "patch_increment")])
def test_its_layers_are_those_of_a_run_downstream(
    flags: list[str], by: str, place: Path, measured: Path, tmp_path: Path
) -> None:
    body = json.loads((measured / "results.json").read_text())
    for record in body["records"]:
        if record["quantity"] == "chosen_layer":
            record["flags"] = flags
    table = tmp_path / "runs" / "rq1_mine" / "version_0" / "results.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(body))
    chosen = Results.read(table).select(quantity="chosen_layer", by=by)
    for layers in (table, "from_rq1"):
        more = [f"--layers={layers}", "--trainer.callbacks=[]"]
        assert run("fit", *config(), *options(place, tmp_path), *more) == 0
        folder = max((tmp_path / "runs" / "clt_cultural").iterdir())
        found = Results.read(folder / "results.json")
        assert {r.site for r in found.select(quantity="r2")} == {r.site for r in chosen}
        assert found.provenance["layers"] == {"from": str(table), "by": by, "flags": flags}


def test_without_a_scan_of_these_very_models_the_default_layers_are_used(
    place: Path, measured: Path, tmp_path: Path
) -> None:
    body = json.loads((measured / "results.json").read_text())
    body["provenance"]["models"]["tuned"]["weights"] = "another"
    table = tmp_path / "runs" / "rq1_mine" / "version_0" / "results.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(body))
    more = ["--layers=from_rq1", "--trainer.callbacks=[]"]
    assert run("fit", *config(), *options(place, tmp_path), *more) == 0
    (folder,) = (tmp_path / "runs" / "clt_cultural").iterdir()
    assert Results.read(folder / "results.json").provenance["layers"] == {"from": "fallback", "flags": []}


@pytest.mark.parametrize(
    ("layers", "said"),
    [("none.json", "cannot read"), ("empty.json", "proposes no layer"), ("odd", "unknown site")],
)
def test_layers_that_cannot_be_read(
    layers: str, said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Results([], {}).write("empty.json")
    assert run("test", *config("rq1_cultural"), *options(place, tmp_path), f"--layers={layers}") == 2
    assert said in capsys.readouterr().err


def test_there_is_nothing_to_fit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--trainer.fast_dev_run=true", "--layers=[1]"]
    assert run("fit", *config("rq1_cultural"), *options(place, tmp_path), *quick) == 2
    assert "Divergence has nothing to fit; run evaluate.py" in capsys.readouterr().err


def test_prompts_beyond_the_context_are_counted_skipped_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    both = pair(loaded(context=64), loaded(context=256, seed=1))
    texts = prompts(1)
    long = replace(texts[3], text="why " * 40)
    given = [*texts[:3], long, *texts[4:]]
    assert fitting(given, both) == [*texts[:3], *texts[4:]]
    said = f"1 of 16 prompts are longer than a model's context and are skipped: {long.id}"
    assert capsys.readouterr().err == f"mechdiff: warning: {said} (key: pair.prompts)\n"
    assert fitting(texts, both) == texts
    assert capsys.readouterr().err == ""
    with pytest.raises(PromptError, match=r"^all 1 prompts are longer than a model's context"):
        fitting([long], both)
