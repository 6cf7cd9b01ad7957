"""A study as a user runs it on tiny pairs: in order, once, resumed where it stopped, compared, reported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mechdiff.__main__ import main
from mechdiff.callbacks.base import Item
from mechdiff.callbacks.layer_patch import LayerPatch
from mechdiff.contrasts import compare
from mechdiff.errors import ConfigError
from mechdiff.functional.contrast import independent_difference
from mechdiff.functional.stats import Interval
from mechdiff.reporting.report.runs import read_study
from mechdiff.results import Results
from mechdiff.study import Step, claim, plan
from tests.reporting.report.make_study import study as plausible
from tests.workspace import ROOT, run, workspace, write_pair

FEW = {
    "mechdiff.callbacks.LayerPatch": {
        "curve_prompts": 8,
        "max_prompts": 8,
        "everywhere_prompts": 0,
        "effect_prompts": 0,
    }
}


def write_configs(folder: Path) -> Path:
    """Write the shipped configurations of RQ1 and RQ2 with little to measure; RQ3 and RQ4 have none."""
    folder.mkdir()
    for name in ("rq1", "clt"):
        for domain in ("cultural", "cognitive"):
            body = yaml.safe_load((ROOT / "configs" / f"{name}_{domain}.yaml").read_text())
            calls = [{"class_path": c, "init_args": a} for c, a in FEW.items()] if name == "rq1" else []
            body["trainer"]["callbacks"] = calls
            body["data"].setdefault("init_args", {})["tokens"] = None
            body |= {"layers": "fallback"} if name == "clt" else {}
            del body["pair"]
            (folder / f"{name}_{domain}.yaml").write_text(yaml.safe_dump(body))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two pair files and small configurations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    other = yaml.safe_load((folder / "pair.yaml").read_text()) | {"name": "other", "domain": "cognitive"}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    write_configs(folder / "configs")
    return folder


def command(place: Path, out: Path, *more: str, pairs: Sequence[str] = ("pair", "other")) -> list[str]:
    files = [str(place / f"{name}.yaml") for name in pairs]
    options = [
        f"--configs={place / 'configs'}",
        "--trainer.accelerator=cpu",
        f"--extraction.root={place / 'stores'}",
    ]
    return ["study", "--pair", *files, "--out", str(out), "--no-figures", *options, *more]


def study(place: Path, out: Path, *more: str, pairs: Sequence[str] = ("pair", "other")) -> int:
    return main(command(place, out, *more, pairs=pairs))


def raises(error: BaseException) -> Callable[..., None]:
    def evaluate(*args: object) -> None:
        raise error

    return evaluate


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a study that ran to the end."""
    out = tmp_path_factory.mktemp("out") / "study"
    assert study(place, out) == 0
    return out


def records(out: Path, pair: str, question: str) -> list[object]:
    return list(json.loads((out / pair / question / "results.json").read_text())["records"])


def test_runs_lie_in_fixed_folders_and_use_the_layers_of_rq1(finished: Path) -> None:
    for pair in ("tiny", "other"):
        for question in ("rq1", "rq2"):
            folder = finished / pair / question
            assert {"results.json", "done.json", "config.yaml"} <= {p.name for p in folder.iterdir()}
        origin = Results.read(finished / pair / "rq2" / "results.json").provenance["layers"]
        assert origin["from"] == str(finished / pair / "rq1" / "results.json")
    text = (finished / "report.md").read_text(encoding="utf-8")
    for said in (
        "tiny",
        "other",
        "rq3 of tiny",
        "rq4 of other",
        "Contrast of the pairs",
        "tiny: rank not measured",
    ):
        assert said in text
    assert (finished / "report.html").is_file()


def test_pairs_are_compared_by_records(finished: Path) -> None:
    found = Results.read(finished / "contrasts.json")
    (r,) = found.select(quantity="r2_delta")
    assert r.params["contrast"] == "other − tiny"
    assert r.low is not None
    assert r.high is not None
    assert r.low <= (r.value or 0) <= r.high
    assert "one_sibling_per_class" in r.flags


def test_what_was_cut_off_is_run_again_alone_and_gives_the_same(place: Path, finished: Path, capsys) -> None:
    before = {(p, q): records(finished, p, q) for p in ("tiny", "other") for q in ("rq1", "rq2")}
    times = {key: (finished / Path(*key) / "results.json").stat().st_mtime_ns for key in before}
    (finished / "tiny" / "rq2" / "done.json").write_text('{"seconds": 1')
    (finished / "tiny" / "rq2" / "results.json").write_text("{")
    assert study(place, finished) == 0
    said = capsys.readouterr().out
    assert "tiny rq1: done before" in said
    assert "tiny rq2: done in" in said
    assert {key: records(finished, *key) for key in before} == before
    again = {key: (finished / Path(*key) / "results.json").stat().st_mtime_ns for key in before}
    assert [key for key in before if again[key] != times[key]] == [("tiny", "rq2")]


def test_a_question_is_done_while_its_table_is_the_one_it_left(tmp_path: Path) -> None:
    config = tmp_path / "rq1_cultural.yaml"
    config.write_text("layers: stride\n")
    step = Step(tmp_path / "pair.yaml", "tiny", "rq1", (config,), tmp_path / "out")
    step.begin()
    table, marker = step.folder / "results.json", step.folder / "done.json"
    assert not step.done
    table.write_text("{}")
    assert not step.done, "no marker"
    step.end(2.0)
    assert step.done
    assert step.seconds == 2.0
    whole = marker.read_text()
    marker.write_text(whole[:20])
    assert not step.done, "half a marker"
    marker.write_text(whole)
    assert step.done
    table.write_text('{"schema": 1}')
    assert not step.done, "another table"
    table.unlink()
    assert not step.done, "no table"
    assert not list(step.folder.glob("*.part"))


def test_a_study_that_cannot_be_read_is_refused_in_one_line(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    out.mkdir()
    (out / "study.json.part").write_text("{")  # cut off before anything was run
    claim(out, [place / "pair.yaml"], quick=False, more=[])
    assert [p.name for p in out.iterdir()] == ["study.json"]
    (out / "study.json").write_text('{"pairs":')
    for command in (lambda: study(place, out, pairs=("pair",)), lambda: main(["report", str(out)])):
        assert command() == 2
        error = capsys.readouterr().err
        assert "study.json does not say of which study it is" in error
        assert error.count("\n") == 1


def test_another_study_is_refused(place: Path, finished: Path, tmp_path: Path, capsys) -> None:
    assert study(place, finished, "--quick") == 2
    error = capsys.readouterr().err
    assert "holds another study (of tiny, other): quick differ; resume it with the same" in error
    assert error.count("\n") == 1
    assert study(place, finished, pairs=("pair",)) == 2
    assert "pair files" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert study(place, tmp_path) == 2
    assert "is not empty and holds no study" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_fails_is_named_and_the_others_go_on(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    more = ("--data.val_frac=0.9", "--questions", "2")
    assert study(place, out, *more) == 2
    said = capsys.readouterr()
    assert "tiny rq2: failed: mechdiff: " in said.out
    assert "other rq2: failed: mechdiff: " in said.out
    assert "val_frac" in said.out
    assert (out / "tiny" / "rq2.log").is_file(), "beside the folder, which a refused run takes away"


def test_an_interrupt_ends_a_study_and_later_questions_follow_the_layers_of_rq1(
    place: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    table = out / "tiny" / "rq2" / "results.json"
    assert study(place, out, "--questions", "2", pairs=("pair",)) == 0
    assert Results.read(table).provenance["layers"]["from"] == "fallback"
    with monkeypatch.context() as patch:
        patch.setattr(LayerPatch, "evaluate", raises(KeyboardInterrupt()))
        assert study(place, out, "--questions", "1,2", pairs=("pair",)) == 130
    said = capsys.readouterr().out
    assert "tiny rq1: interrupted; the same command goes on from it" in said
    assert "tiny rq2: " not in said.partition("interrupted")[2]
    assert not (out / "tiny" / "rq1" / "done.json").exists()
    assert study(place, out, "--questions", "1,2", pairs=("pair",)) == 0
    assert "tiny rq2: run again: rq1 proposes other layers" in capsys.readouterr().out
    assert Results.read(table).provenance["layers"]["from"] == str(out / "tiny" / "rq1" / "results.json")
    assert study(place, out, "--questions", "2", pairs=("pair",)) == 0
    assert "tiny rq2: done before" in capsys.readouterr().out


def test_questions_that_take_layers_are_left_out_where_rq1_failed(
    place: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    monkeypatch.setattr(LayerPatch, "evaluate", raises(ConfigError("no")))
    assert study(place, out, "--questions", "1,2", pairs=("pair",)) == 2
    said = capsys.readouterr().out
    assert "tiny rq1: failed: mechdiff: no" in said
    assert "tiny rq2: left out: its layers come from rq1, which failed" in said
    assert not (out / "tiny" / "rq2").exists()


def test_sigterm_ends_a_study(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    code = (
        "import os, signal, sys, time\n"
        "from mechdiff.__main__ import main\n"
        "from mechdiff.callbacks.layer_patch import LayerPatch\n"
        "def told(*args):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n    return []\n"
        "LayerPatch.evaluate = told\n"
        f"raise SystemExit(main({command(place, out, '--questions', '1,2', pairs=('pair',))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 143, done.stderr
    assert "tiny rq1: interrupted" in done.stdout
    assert not list(out.rglob("results.json"))
    assert not (out / "tiny" / "rq2").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--questions", "5"], "questions is '5'; allowed: some of 1,2,3,4"),
        (["--questions", "3"], "nothing can be run: rq3 of tiny: no"),
    ],
)
def test_bad_input_is_one_line(more: list[str], said: str, place: Path, tmp_path: Path, capsys) -> None:
    assert study(place, tmp_path / "study", *more, pairs=("pair",)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_pair_file_with_an_unknown_key_is_refused(place: Path, tmp_path: Path, capsys) -> None:
    write_pair(place, "wrong.yaml", colour="blue")
    with pytest.raises(SystemExit) as left:
        study(place, tmp_path / "study", pairs=("wrong",))
    assert left.value.code == 2
    assert "unknown key" in capsys.readouterr().err


def test_two_pairs_of_one_name_are_refused(place: Path, tmp_path: Path, capsys) -> None:
    assert study(place, tmp_path / "study", pairs=("pair", "pair")) == 2
    assert "two pairs have the name tiny" in capsys.readouterr().err


def test_shipped_pairs_have_a_plan() -> None:
    pairs = [ROOT / "configs" / "pairs" / f"{name}_smol.yaml" for name in ("cultural", "cognitive")]
    questions = ["rq1", "rq2", "rq3", "rq4"]
    steps, without = plan(pairs, questions, Path("out"), ROOT / "configs", quick=True)
    assert len(steps) + len(without) == 8
    assert [s.question for s in steps][:2] == ["rq1", "rq2"]
    assert all(len(s.configs) == 2 for s in steps), "a quick study has a reduced configuration for each"


@pytest.mark.parametrize("pair", ["cultural", "cognitive"])
def test_reduced_configurations_are_understood(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "configs" / "pairs" / f"{pair}_smol.yaml"
    for step in plan([file], ["rq1", "rq2", "rq3", "rq4"], Path("out"), ROOT / "configs", quick=True)[0]:
        verb = "test" if step.question in ("rq1", "rq4") else "fit"
        assert run(verb, *step.arguments(), "--print_config") == 0
        calls = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        reduced = yaml.safe_load(step.configs[1].read_text())["trainer"]["callbacks"]
        assert [c["class_path"] for c in calls] == [c["class_path"] for c in reduced]


def test_numbers_of_two_pairs_are_compared(tmp_path: Path) -> None:
    plausible(tmp_path)
    (tmp_path / "contrasts.json").unlink()
    draws = torch.Generator().manual_seed(0)
    tables = {}
    for name, prompts, changed in (("cultural_smol", 12, 1), ("cognitive_smol", 9, 3)):
        base = torch.randn(prompts, 6, generator=draws) * 0.01
        tuned = base + torch.tensor([1.0 * (h < changed) for h in range(6)])
        tables[name] = tuned.double() - base.double()
        rows = [
            Item(f"p{i}", "head_attribution", f"head_out.{h}", "all", role, f"logit_diff/twin/{h}.0", x)
            for role, table in (("base", base), ("tuned", tuned))
            for i, row in enumerate(table.tolist())
            for h, x in enumerate(row)
        ]
        rows += [replace(row, arm=row.arm.replace("twin", "zero"), value=9.0) for row in rows]
        file = tmp_path / name / "rq4" / "items.parquet"
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), file)
    for start, name in ((0, "cultural_smol"), (10, "cognitive_smol")):
        write_patches(tmp_path / name / "rq1", range(start, start + 40))
    path = compare(read_study([tmp_path]))
    assert path == tmp_path / "contrasts.json"
    found = Results.read(path)
    assert {r.quantity for r in found} == {
        "patch_recovery",
        "r2_delta",
        "interchange_recovery",
        "churn_difference",
    }
    (r,) = found.select(quantity="churn_difference")
    assert r.value == pytest.approx(2 / 6)
    assert (r.params["floor_from"], r.params["floors"]) == ("label_swap", [0.03, 0.03])
    assert r.n == 12, "prompts of both are counted once"
    assert r.flags == ("one_sibling_per_class", "not_paired")
    assert r.params["contrast"] == "cognitive_smol − cultural_smol"
    one, other = (
        p.one("rq2", quantity="r2_delta", site="resid_post.24", positions="last")
        for p in read_study([tmp_path]).pairs
    )
    assert one is not None
    assert other is not None
    ends = [Interval(x.value, x.low, x.high, x.n) for x in (one, other)]
    (r,) = found.select(quantity="r2_delta")
    assert (r.value, r.low, r.high) == independent_difference(*ends)[:3]
    assert r.n == max(end.n for end in ends)
    assert "not_paired" in r.flags
    (r,) = found.select(quantity="patch_recovery")
    assert r.params["sites"] == ["resid_post.28", "resid_post.28"], "the first proposed, not the better"
    assert (r.value, r.n, r.flags) == (pytest.approx(0.0, abs=1e-6), 50, ("one_sibling_per_class",))
    assert (r.high or 0) - (r.low or 0) < 0.2, "narrower than apart"
    (tmp_path / "cognitive_smol" / "rq1" / "items.parquet").unlink()
    compare(read_study([tmp_path]))
    (r,) = Results.read(path).select(quantity="patch_recovery")
    assert (r.n, r.flags) == (40, ("one_sibling_per_class", "not_paired"))


def write_patches(folder: Path, prompts: range) -> None:
    """Write values by prompt that agree with the record of a patch at the first layer proposed."""
    (r,) = Results.read(folder / "results.json").select(
        quantity="patch_recovery",
        site="resid_post.28",
        positions="last",
        direction="into_tuned",
        control="none",
        prompts="all",
    )
    rows = []
    for i in prompts:
        gap = 1 + i % 7 / 7
        about = (str(r.site), "last", "into_tuned")
        for arm, value in (("self", gap), ("raw", gap * (1 - (r.value or 0)))):
            rows.append(Item(f"p{i}", "patch_kl_to_donor", *about, arm, value))
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), folder / "items.parquet")
