"""The short form of `make torture`: a handful of kills, and a check that damage would be counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mechdiff.data.manifest import MANIFEST
from tests.torture import memory, works
from tests.workspace import ROOT

KILLS = ["4", "2", "1", "1", "2"]


def test_a_handful_of_kills(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.torture", "--kills", *KILLS, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text())
    assert counts.pop("seed") >= 0
    assert len(counts) == len(KILLS)
    for count, kills in zip(counts.values(), KILLS, strict=True):
        assert count["kills"] >= int(kills)
        assert count["finished"] >= 1
        assert not count["unreadable"] + count["lost"] + count["failed"]
        assert count["duplicates"] == count["different"] == 0


def test_damage_is_counted(tmp_path: Path) -> None:
    """What the counts above rest on does see a lost row and a half-written file."""
    assert works._extract(1, tmp_path) == 0
    assert not works._bad_stores(tmp_path)
    before, wanted = works._shards(tmp_path), works._files(tmp_path)
    victim = next(tmp_path.rglob("shard-00001.h5"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    after = works._shards(tmp_path)
    assert [name for name in before if after.get(name) != before[name]] == [
        str(victim.with_suffix(".json").relative_to(tmp_path))
    ]
    assert len(works._bad_stores(tmp_path)) == 2, "the record is not that of its shard, nor does it open"
    assert works._files(tmp_path) != wanted
    victim.write_bytes(content)
    next(tmp_path.rglob(f"pass-*/{MANIFEST}")).write_text("{")
    assert works._bad_stores(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"schema": 1, "rec')
    (run / "report.html").write_text("<html><body>half")
    (run / "last.ckpt").write_bytes(b"PK")
    assert len(works._bad_runs(run)) == 3


def test_memory_of_an_extraction_is_not_that_of_its_activations(tmp_path: Path) -> None:
    families = 8
    texts = 16 * families * (memory.TIMES - 1)
    found = memory.measure(tmp_path, families, ["extraction"])
    assert not memory.grown(found["extraction"], texts), found
    stores = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*.h5")) for n in ("1", "10")]
    assert (stores[1] - stores[0]) / 1024 > 5 * memory.EACH * texts, "or nothing would be seen"
