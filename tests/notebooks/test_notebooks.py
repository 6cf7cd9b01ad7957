"""The notebooks run one after the other on a tiny pair; what is stored of a real run is fit to be read."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

from mechdiff.results import Results
from tests.workspace import ROOT, workspace

FILES = sorted((ROOT / "mechdiff" / "notebooks").glob("*.ipynb"))
RUNS = {"R1_baseline": "rq1", "R2_clt": "rq2", "R3_causal": "rq3", "R4_churn": "rq4"}
FEW: dict[str, dict[str, dict[str, Any]]] = {
    "rq1": {
        "Behaviour": {"max_prompts": 1, "max_graded": 1, "answer_tokens": 2},
        "LayerPatch": {"curve_prompts": 6, "max_prompts": 6, "everywhere_prompts": 0, "effect_prompts": 2},
    },
    "clt": {"MappedPatch": {"max_prompts": 4, "all_prompts": 2, "effect_prompts": 0}},
    "steering": {
        "Steering": {
            "edits": ["interchange", "ablate"],
            "ks": [1, 2],
            "alphas": [0.5, 1.0],
            "min_neutral": 4,
            "draws": 4,
            "random_eval": 2,
            "graded_prompts": 0,
            "generated_prompts": 0,
        },
        "HandleHeads": {"top": 4, "drawn": 4, "max_prompts": 2},
    },
    "rq4": {
        "Heads": {
            "max_prompts": 6,
            "truth_prompts": 4,
            "exact_prompts": 2,
            "top": 4,
            "drawn": 4,
            "grafted": 2,
            "graft_prompts": 2,
            "together_prompts": 2,
            "orders": 2,
            "edge_heads": 2,
            "edge_prompts": 2,
            "nulls": 20,
        }
    },
}
"""What little is measured here, by the beginning of a configuration's name."""
MOST, MOST_PICTURE = 150_000, 60_000
"""Bytes of a stored notebook, and of a figure in it."""


def write_configs(folder: Path) -> Path:
    """Write the shipped configurations with little to measure."""
    folder.mkdir()
    for name, callbacks in FEW.items():
        body = yaml.safe_load((ROOT / "configs" / f"{name}_cultural.yaml").read_text())
        del body["pair"]
        calls = [{"class_path": f"mechdiff.callbacks.{c}", "init_args": a} for c, a in callbacks.items()]
        body["trainer"]["callbacks"] = calls
        if name == "clt":
            body["data"]["init_args"] = {"tokens": None}  # all of them are fewer than are asked for
        (folder / f"{name}_cultural.yaml").write_text(yaml.safe_dump(body))
    return folder


def with_parameters(notebook: NotebookNode, **values: Any) -> NotebookNode:
    """Add a cell with other values after the one that is tagged `parameters`."""
    (at,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
    return notebook


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def pictures(notebook: NotebookNode) -> list[bytes]:
    found = (output.get("data", {}).get("image/png") for output in outputs(notebook))
    return [base64.b64decode(text) for text in found if text]


def said(notebook: NotebookNode) -> str:
    return "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs(notebook)
    )


def test_there_is_one_for_each_question() -> None:
    assert {file.stem for file in FILES} == RUNS.keys()


def test_they_run_in_order_on_a_tiny_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    pair, configs = workspace(tmp_path / "user"), write_configs(tmp_path / "configs")
    values = {"pair": str(pair), "configs": str(configs), "out": str(tmp_path / "out")}
    values["more"] = ["--trainer.accelerator=cpu", f"--extraction.root={tmp_path / 'stores'}"]
    notebooks = [with_parameters(nbformat.read(file, as_version=4), **values) for file in FILES]
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=None, kernel_name="python3", startup_timeout=240
    )
    with client.setup_kernel(
        cwd=str(tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ):
        for file, notebook in zip(FILES, notebooks, strict=True):
            client.nb = notebook
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)  # raises with the cell's source if it fails
            run = tmp_path / "out" / "tiny" / RUNS[file.stem]
            results = Results.read(run / "results.json")
            assert {r.question for r in results} == {RUNS[file.stem]}
            assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]
            text = said(notebook)
            assert f"{len(results)} records" in text
            assert all(column in text for column in ("control", "value", "low", "high", " n "))
            assert len(pictures(notebook)) == sum("figure.set_dpi" in c.source for c in notebook.cells) == 2
            client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
            client.execute_cell(client.nb.cells[0], 0)  # one kernel, imported once, but nothing is handed on
    origin = Results.read(tmp_path / "out" / "tiny" / "rq2" / "results.json").provenance["layers"]
    assert origin["from"] == str(tmp_path / "out" / "tiny" / "rq1" / "results.json")
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_stored_is_small_of_one_run_and_of_no_one_machine(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.stat().st_size < MOST
    assert max(map(len, pictures(notebook))) < MOST_PICTURE
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "cells that have not run, or of several runs"
    assert any(outputs(notebook)), "nothing to see"
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert "cultural_smol" in code[0].source
    assert not re.search(r"(?<![\w.<])/(?!/)[a-z]+/\w", said(notebook)), "an absolute path"
