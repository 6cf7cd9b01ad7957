from pathlib import Path

import pytest

from mechdiff.errors import PairError
from mechdiff.pairs.spec import FilePath, ModelId, ModelSpec, PairSpec

GOOD = {"name": "x", "base": ModelSpec(ModelId("a/b")), "tuned": ModelSpec(ModelId("a/c")), "prompts": ["p"]}


def test_a_path_is_absolute_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert FilePath("a/../b.jsonl") == str(tmp_path / "b.jsonl")
    assert FilePath("~/c") == str(tmp_path / "home" / "c")
    assert FilePath("/d") == "/d"
    assert FilePath("") == FilePath() == ""
    with pytest.raises(TypeError):
        FilePath(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "kept"),
    [("some/model", True), ("gpt2", True), ("wheel:a==1/b.gguf", True), ("./gpt2", False), ("folder", False)],
)
def test_a_model_is_a_folder_only_if_it_is_one(
    written: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert ModelId(written) == (written if kept else str(tmp_path / Path(written).name))


def test_a_good_pair_is_returned() -> None:
    pair = PairSpec(**GOOD)
    assert pair.check() is pair
    assert pair.min_shared_coverage == 1.0  # strict unless a pair says otherwise


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"name": ""}, "pair.name"),
        ({"base": ModelSpec()}, "pair.base.id"),
        ({"tuned": ModelSpec()}, "pair.tuned.id"),
        ({"prompts": []}, "pair.prompts"),
        ({"min_shared_coverage": -0.1}, "pair.min_shared_coverage"),
        ({"min_shared_coverage": float("nan")}, "pair.min_shared_coverage"),
    ],
)
def test_a_bad_pair_names_the_key(more: dict, key: str) -> None:
    with pytest.raises(PairError, match=rf"\(key: {key}\)$") as caught:
        PairSpec(**GOOD | more).check()
    assert "\n" not in str(caught.value)
