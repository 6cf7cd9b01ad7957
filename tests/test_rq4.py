"""Which heads were rewired: the command as a user runs it."""

from pathlib import Path

import pyarrow.parquet as pq
import torch

from mechdiff.results import Results
from tests.reporting.events import check_layout, read, started
from tests.workspace import config, run, workspace


def test_a_run_answers_the_question_and_leaves_its_parts(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pair = workspace(tmp_path / "user")
    places = [f"--trainer.logger.save_dir={tmp_path / 'runs'}", f"--extraction.root={tmp_path / 'stores'}"]
    options = [*config("rq4_cultural"), f"--pair={pair}", "--trainer.accelerator=cpu", *places]
    assert run("test", *options) == 0
    (folder,) = (tmp_path / "runs" / "rq4_cultural").iterdir()
    results = Results.read(folder / "results.json")
    assert {r.question for r in results} == {"rq4"}
    assert {r.model for r in results.select(quantity="head_attribution")} == {"base", "tuned", "pair"}
    assert not (tmp_path / "stores").exists()
    figures = {p.name for p in (folder / "figures").iterdir()}
    assert {"head_maps.png", "head_churn.png", "head_cumulative.png", "head_truth.png"} <= figures
    items = pq.read_table(folder / "items.parquet").to_pylist()
    prompts = {item["prompt"] for item in items}
    assert len(items) == len(prompts) * 2 * 16
    assert (folder / "config.yaml").is_file()
    events = read(folder)
    assert started(events)["question"] == "rq4"
    assert any("cumulative_effect" in title for titles in check_layout(events).values() for title in titles)
    assert not (folder / "projector_config.pbtxt").exists(), "no states are stored"


def test_there_is_nothing_to_fit(tmp_path: Path, capsys) -> None:
    pair = workspace(tmp_path / "user")
    assert run("fit", *config("rq4_cultural"), f"--pair={pair}", "--trainer.fast_dev_run=true") == 2
    assert "HeadComparison has nothing to fit; run evaluate.py" in capsys.readouterr().err
