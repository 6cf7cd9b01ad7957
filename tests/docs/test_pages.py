"""What the documentation shows is there and works: commands, files, names."""

import ast
import doctest
import importlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mechdiff.__main__ import VERBS
from mechdiff.commands import report, study
from mechdiff.data.contrast import NEED, check_bound
from mechdiff.data.prompts import load_prompts
from mechdiff.reporting.figures import FIGURES
from mechdiff.results import CONTROLS, QUANTITIES, Record, Results
from mechdiff.study import read_pair
from tests.docs.pages import PAGES, ROOT, commands, fences, write_files
from tests.test_layers import allowed, imports
from tests.workspace import config, run, save_model, small, workspace

COMMANDS = list(commands())
ELSEWHERE = {"pip", "tensorboard"}
"""Commands of others."""
SCRIPTS = {"train.py": "fit", "evaluate.py": "test"}
QUESTIONS = ["rq1_cultural", "clt_cultural", "steering_cultural", "rq4_cultural"]
FIELDS = {field.name for field in fields(Record)}


def verb_of(name: str) -> str:
    """Return the verb of a configuration."""
    return "test" if name.startswith("rq") else "fit"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a copy of the repository that holds the files which the pages show."""
    for name in ("data", "docs", "Makefile", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir(exist_ok=True)
    for path in (ROOT / "configs").iterdir():
        (tmp_path / "configs" / path.name).symlink_to(path)
    for page in PAGES:
        write_files(page.name, tmp_path)
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine" / "pair.yaml").read_text().replace("../", "./"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the files of the page on another method, which can be imported."""
    write_files("method.md", tmp_path)
    for room in ("functional", "modules"):
        package = importlib.import_module(f"mechdiff.{room}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "mechdiff" / room)])
        monkeypatch.delitem(sys.modules, f"mechdiff.{room}.diagonal", raising=False)
        monkeypatch.delattr(package, "diagonal", raising=False)
    return tmp_path


# --- commands --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood(words: list[str], place: Path) -> None:
    first, *rest = words
    if first == "python" and rest[0] in SCRIPTS:
        shown = [] if any(word.startswith("--model.help") for word in rest) else ["--print_config"]
        assert run(SCRIPTS[rest[0]], *rest[1:], *shown) == 0
    elif first == "python":
        name = rest[1].replace(".", "/") if rest[0] == "-m" else rest[0].removesuffix(".py")
        files = [f"{name}.py", f"{name}/__main__.py"]
        assert any((folder / file).is_file() for folder in (ROOT, place) for file in files)
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif first == "mechdiff":
        understood(*rest)
    else:
        assert first in ELSEWHERE


def understood(verb: str, *rest: str) -> None:
    """Check a verb of the ``mechdiff`` command."""
    assert verb in VERBS
    if verb == "extract":
        assert run("fit", *rest, "--print_config") == 0
    elif verb == "study":
        given, more = study.parser().parse_known_args(rest)
        assert all(path.is_file() for path in given.pair)
        for name in QUESTIONS:
            assert run(verb_of(name), *config(name), *more, "--print_config") == 0
    elif verb == "report":
        report.parser().parse_args(rest)
    else:
        options = [word.partition("=")[0] for word in rest if word.startswith("--")]
        shown = subprocess.run(
            [sys.executable, "-m", "mechdiff", verb, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert [option for option in options if option not in shown.stdout] == []


# --- another domain --------------------------------------------------------------------------------------


def test_the_prompts_of_the_other_domain_are_what_the_page_says(place: Path) -> None:
    runpy.run_path("mine/make_prompts.py")
    for pair in ("mine/pair.yaml", "mine/russian.yaml"):
        spec = read_pair(place / pair, [f"--may_read={ROOT / 'data'}"])
        assert all(Path(file).is_file() for file in [*spec.prompts, spec.openings, *spec.benchmarks.values()])
        assert Path(str(spec.tuned.adapter)).is_dir()
    lines = (place / "mine" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (shown,) = (json.loads(f.text) for f in fences("swap.md") if f.language == "json")
    assert shown in map(json.loads, lines)
    found = load_prompts(["mine/prompts.jsonl"])
    assert len(found) == 408
    for split in ("dev", "eval"):
        assert len(check_bound(found, split)) == NEED
    kinds = {(p.split, p.label) for p in found}
    for name in ("text", "topic", "template"):
        values = [{getattr(p, name) for p in found if (p.split, p.label) == kind} for kind in kinds]
        assert sum(map(len, values)) == len(set().union(*values)), f"a {name} is in two splits or classes"


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_runs_on_the_files_of_the_other_domain(name: str, place: Path) -> None:
    runpy.run_path("mine/make_prompts.py")
    body = yaml.safe_load((place / "mine" / "pair.yaml").read_text())
    for role, noise in (("base", 0.0), ("tuned", 0.02)):
        save_model(place / "mine" / role, noise=noise)
        body[role] = {"id": f"./{role}"}
    (place / "mine" / "pair.yaml").write_text(yaml.safe_dump(body))
    options = [
        "--pair",
        "mine/pair.yaml",
        "--may_read=data",
        "--trainer.fast_dev_run=true",
        "--layers=[1, 2]",
    ]
    assert run(verb_of(name), *config(name), *options, "--trainer.accelerator=cpu") == 0


# --- another method --------------------------------------------------------------------------------------


def test_the_other_method_keeps_to_its_rooms(method: Path) -> None:
    for room in ("functional", "modules"):
        name = f"mechdiff.{room}.diagonal"
        tree = ast.parse((method / "mechdiff" / room / "diagonal.py").read_text())
        assert all(allowed(name, target) for target in imports(tree, name) if target.startswith("mechdiff"))
    functional = importlib.import_module("mechdiff.functional.diagonal")
    assert doctest.testmod(functional) == doctest.TestResults(0, 3)


def test_the_other_method_runs_and_its_records_say_so(method: Path, tmp_path: Path) -> None:
    pair = workspace(tmp_path / "pair")
    options = [*config(), "--config", method / "configs" / "diagonal.yaml", *small(pair, tmp_path)]
    assert run("fit", *options, "--trainer.callbacks=[]") == 0
    (folder,) = (tmp_path / "runs" / "diagonal").iterdir()
    results = Results.read(folder / "results.json")
    found = results.select(quantity="r2_delta", solver="diagonal", lambda_=None)
    assert {r.control for r in found} == {"none", "mean_shift", "shuffled", "wrong_layer"}
    again = [*options, "--ckpt_path", folder / "checkpoints" / "fitted.ckpt", "--trainer.callbacks=[]"]
    assert run("test", *again) == 0


# --- names -----------------------------------------------------------------------------------------------


def table(title: str) -> set[str]:
    """Return the names in the first column of the tables under a heading of the page on records."""
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    rows = text.partition(f"\n{title}\n")[2].split("\n#")[0].splitlines()
    return {
        name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }


@pytest.mark.parametrize("question", QUANTITIES)
def test_every_quantity_is_described(question: str) -> None:
    assert table(f"### {question.upper()}") == QUANTITIES[question]


def test_every_control_and_every_field_of_a_record_is_described() -> None:
    assert table("## Controls") == CONTROLS
    assert table("## A record") == FIELDS
    (shown,) = (f.text for f in fences("records.md") if f.language == "json")
    assert Record(**json.loads(shown)).quantity == "r2_delta"
    assert set(json.loads(shown)) == FIELDS


@pytest.mark.parametrize("title", ["## Reasons", "## Flags"])
def test_words_of_records_are_words_of_the_code(title: str) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mechdiff").rglob("*.py"))
    assert [word for word in table(title) if f'"{word}"' not in source] == []


def test_figures_that_are_named_exist() -> None:
    drawn = {file for file, *_ in FIGURES.values()}
    named = {name for page in PAGES for name in re.findall(r"`(\w+\.png)`", page.read_text("utf-8"))}
    assert len(named) > 5
    assert named <= drawn
