"""What the doctor says of a sound machine and of one where something is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mechdiff.__main__ import main
from mechdiff.commands import doctor
from tests.workspace import workspace, write_pair


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pair file whose models and prompts are there."""
    return workspace(tmp_path_factory.mktemp("user"))


def test_a_sound_machine(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--pair", str(sound), "--stores", str(tmp_path / "stores")]) == 0
    said = capsys.readouterr().out
    for line in ("torch 2", "cores", "tiny: all models are here; its stores need at most", "0 stores"):
        assert line in said
    assert said.splitlines()[-1].split() == ["wrong", "nothing"]
    assert len(said.splitlines()) < 24, "one screen"


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = workspace(tmp_path)
    shutil.rmtree(tmp_path / "tuned")
    (tmp_path / "openings.jsonl").unlink()
    (tmp_path / "stores" / "0123").mkdir(parents=True)
    other = write_pair(tmp_path, "far.yaml", base={"id": "nobody/nothing"}, tuned={"id": "./base"})
    odd = write_pair(tmp_path, "odd.yaml", colour="blue")
    files = [str(path) for path in (pair, other, odd)]
    assert main(["doctor", "--pair", *files, "--stores", str(tmp_path / "stores")]) == 1
    wrong = capsys.readouterr().out.partition("wrong ")[2]
    assert f"{tmp_path / 'tuned'} holds no complete *.safetensors (key: pair.tuned.id)" in wrong
    assert "nobody/nothing is not in the local cache; run: hf download nobody/nothing" in wrong
    assert "odd.yaml is not a pair file" in wrong
    assert "0123 has no manifest" in wrong


def test_a_disk_that_is_too_small(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main(["doctor", "--pair", str(sound), "--stores", str(tmp_path)]) == 1
    assert "GiB are free" in capsys.readouterr().out


def test_a_package_that_is_not_installed(sound: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["torch>=2", "no-such-thing>=1", "x; extra == 'dev'"]
    )
    assert main(["doctor", "--pair", str(sound)]) == 1
    wrong = capsys.readouterr().out.partition("wrong ")[2]
    assert "no-such-thing is not installed" in wrong
    assert "x is not" not in wrong
