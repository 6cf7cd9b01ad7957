"""What the doctor says of a sound machine and of one where something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mechdiff.__main__ import main
from mechdiff.commands import doctor
from mechdiff.data.prompts import load_prompts
from mechdiff.study import read_pair
from tests.workspace import workspace, write_pair

NONE = "mechdiff.data.nothing.NoStates"


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


@pytest.mark.parametrize(
    ("body", "said", "share"),
    [
        ({"layers": [1, 2]}, "48 fit prompts at 2 sites, all positions, float32", 1),
        ({"layers": [1], "extraction": {"dtype": "bfloat16"}}, "at 1 site, all positions, bfloat16", 1 / 4),
        ({"layers": "stride"}, "at 2 sites, all positions, float32", 1),
        ({"layers": [1, 2], "extraction": {"positions": "last"}}, "at 2 sites, the last position", None),
        ({"layers": [0], "data": {"class_path": NONE}}, "mine stores no states", 0),
    ],
)
def test_the_disk_is_reckoned_for_a_configuration(
    body: dict[str, object], said: str, share: float | None, sound: Path, tmp_path: Path
) -> None:
    spec = read_pair(sound)
    plain = {"data": {"class_path": "mechdiff.data.activations.ActivationPairs"}}
    sizes = []
    for number, settings in enumerate(({"layers": [1, 2]}, body)):
        file = tmp_path / str(number) / "mine.yaml"
        file.parent.mkdir()
        file.write_text(yaml.safe_dump(plain | settings))
        found = doctor._needed(spec, doctor._kept(file))
        assert found is not None
        sizes.append(found[0])
    assert said in found[1]
    texts = [p for p in load_prompts(spec.prompts) if p.split == "fit"]
    width = json.loads((sound.parent / "base" / "config.json").read_text())["hidden_size"]
    rows = len(texts)  # two sites of two models, four bytes a number
    assert sizes[1] == (2 * 2 * rows * width * 4 if share is None else share * sizes[0])


def test_what_was_assumed_without_a_configuration_is_said(sound: Path, capsys) -> None:
    assert main(["doctor", "--pair", str(sound)]) == 0
    said = capsys.readouterr().out
    assert "GiB (a run without a configuration: " in said
    assert "site, all positions, float32)" in said, "the default layers of a model of four"


def test_a_configuration_that_does_not_fit(sound: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "deep.yaml"
    body = {"layers": [99], "data": {"class_path": "mechdiff.data.activations.ActivationPairs"}}
    file.write_text(yaml.safe_dump(body))
    assert main(["doctor", "--pair", str(sound), "--config", str(file)]) == 1
    assert "tiny with deep: site resid_post.99 is out of range" in capsys.readouterr().out
    file.write_text("layers: [")
    assert main(["doctor", "--pair", str(sound), "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "deep.yaml is not a configuration of a run" in error
    assert error.count("\n") == 1
