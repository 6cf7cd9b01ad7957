"""What the doctor says of a store, sound and broken, and that only what is broken is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mechdiff.__main__ import main
from mechdiff.data.manifest import MANIFEST
from tests.extraction.test_extractor import extract, shards, whole  # noqa: F401 - a fixture


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:  # noqa: F811
    """Return the folder of a store, to be broken."""
    shutil.copytree(whole, tmp_path / "stores")
    return next((tmp_path / "stores").iterdir())


def say(store: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    code = main(["doctor", str(store)])
    said, _, wrong = capsys.readouterr().out.partition("wrong ")
    return code, said, [line.strip() for line in wrong.strip().splitlines()]


def rows(store: Path) -> list[int]:
    held = extract(store.parent)
    (part,) = {id(p): p for p in held._passes.values()}.values()
    return part.starts


def test_a_sound_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, wrong = say(store, capsys)
    assert code == 0
    assert wrong == ["nothing"]
    assert f"{store}: 48 prompts, all positions, float32" in said
    *_, last = rows(store)
    assert f"head_z.2, resid_post.1; {len(rows(store)) - 1} shards, {last} rows; sound rows: 0 to " in said
    assert said.rstrip().endswith(f" 0 to {last - 1}")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def swap(path: Path) -> None:
    other = path.with_name("shard-00002.h5")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said", "broken"),
    [
        (flip, "shard-00001.h5 is damaged: its checksum has changed", [1]),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: its checksum has changed", [1]),
        (Path.unlink, "shard-00001.h5 is missing from the store", [1]),
        (swap, "shard-00001.h5 is damaged: it is shard-00002.h5", [1, 2]),
        (lambda path: path.with_suffix(".json").write_text("{}"), "is not of schema", [1]),
    ],
    ids=["flipped", "truncated", "missing", "swapped", "record"],
)
def test_what_is_broken_is_named_and_made_again_alone(
    store: Path,
    capsys: pytest.CaptureFixture[str],
    whole: Path,  # noqa: F811
    harm: Callable[[Path], None],
    said: str,
    broken: list[int],
) -> None:
    starts = rows(store)
    harm(next(store.rglob("shard-00001.h5")))
    code, shown, wrong = say(store, capsys)
    assert code == 1
    assert said in wrong[0]
    assert len(wrong) == len(broken)
    for line, number in zip(wrong, broken, strict=True):
        assert f"(rows {starts[number]} to {starts[number + 1] - 1}); run the command that made it" in line
    assert f"sound rows: 0 to {starts[1] - 1}, {starts[broken[-1] + 1]} to {starts[-1] - 1}" in shown
    before = {path.name: path.stat().st_mtime_ns for path in store.rglob("*.h5")}
    if said == "is not of schema":  # the shard is sound: only a resumed run would write it again
        next(store.rglob(f"pass-*/{MANIFEST}")).unlink()
    extract(store.parent)
    assert shards(store.parent) == shards(whole)
    after = {path.name: path.stat().st_mtime_ns for path in store.rglob("*.h5")}
    again = {name for name in after if after[name] != before.get(name)}
    assert again == {f"shard-0000{number}.h5" for number in broken}
    assert say(store, capsys)[0] == 0


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda s: (s / MANIFEST).write_text("{"), "manifest.json is not JSON"),
        (lambda s: next(s.glob(f"pass-*/{MANIFEST}")).write_text("{}"), "manifest.json is not of schema"),
        (lambda s: next(s.glob(f"pass-*/{MANIFEST}")).unlink(), "is not complete: "),
    ],
    ids=["store", "pass", "unfinished"],
)
def test_manifests(
    store: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], said: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.h5")}
    harm(store)
    code, _, wrong = say(store, capsys)
    assert code == 1
    assert said in wrong[0]
    assert wrong[0].endswith("only the rest is computed")
    if "remove it" in wrong[0]:
        Path(wrong[0].partition(" is ")[0]).unlink()
    extract(store.parent)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.h5")} == before
    assert say(store, capsys)[0] == 0


@pytest.mark.parametrize(
    ("width", "said", "again"),
    [
        (2**40, "says {rows} rows of {both} numbers, more than shard-00000.h5 holds; remove it", []),
        (31, "does not hold sites/head_z.2 whole, as ({rows}, 31) numbers of type float32; remove it", [0]),
    ],
)
def test_a_manifest_that_contradicts_its_shards(
    store: Path,
    capsys: pytest.CaptureFixture[str],
    whole: Path,  # noqa: F811
    width: int,
    said: str,
    again: list[int],
) -> None:
    """Every shard has its checksum; only what they hold tells."""
    first = rows(store)[1]
    manifest = next(store.glob(f"pass-*/{MANIFEST}"))
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(body | {"sites": dict.fromkeys(body["sites"], width)}))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.h5")}
    code, _, wrong = say(store, capsys)
    assert code == 1
    assert said.format(rows=first, both=2 * width) in wrong[0]
    assert len(wrong) == 1
    manifest.unlink()
    for number in again:
        (manifest.parent / f"shard-0000{number}.h5").unlink()
    extract(store.parent)
    assert shards(store.parent) == shards(whole)
    changed = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert changed == [f"shard-0000{number}.h5" for number in again]
    assert say(store, capsys)[0] == 0


def test_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, wrong = say(tmp_path, capsys)
    assert code == 1
    assert len(wrong) == 1
    assert wrong[0].startswith(f"cannot read {tmp_path / MANIFEST}: No such file or directory; expected")
