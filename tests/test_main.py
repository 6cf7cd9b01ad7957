"""The verbs of the command: each is a module, its help is quick, and a shell completes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mechdiff.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "args", [["completion"], *([verb, "--help"] for verb in ("study", "report", "calibrate", "doctor"))]
)
def test_help_of_a_verb_loads_no_heavy_library(args: list[str]) -> None:
    code = (
        "import sys\nfrom mechdiff.__main__ import main\n"
        f"try:\n    code = main({args})\nexcept SystemExit as left:\n    code = left.code or 0\n"
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib', 'h5py'} & set(sys.modules)\n"
        "raise SystemExit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_verb_is_a_module() -> None:
    for verb in VERBS:
        assert (ROOT / "mechdiff" / "commands" / f"{verb}.py").is_file()


def test_a_shell_completes_the_verbs() -> None:
    words = f'compgen -W "{" ".join(VERBS)}" st'
    script = f'eval "$({sys.executable} -m mechdiff completion)"; complete -p mechdiff; {words}'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(verb in done.stdout.splitlines()[0] for verb in VERBS)
    assert done.stdout.splitlines()[1:] == ["study"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["report"], "the following arguments are required: RUN"),
        (["report", "x", "--colour"], "unrecognized arguments: --colour"),
        (["study"], "the following arguments are required: --pair"),
        (["doctor", "--pair"], "expected at least one argument"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("mechdiff: ")
    assert error.count("\n") == 1
