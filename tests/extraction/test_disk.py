"""Disks that are full, folders that are gone or closed, and a store that someone else writes."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest

from mechdiff.errors import StoreError
from mechdiff.extraction import spec
from mechdiff.extraction.lock import LOCK
from tests.extraction.test_extractor import ROOT, extract, leftovers, shards, whole  # noqa: F401 - a fixture

NOBODY = 65534


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Close a folder to this process; root drops what lets it write anywhere."""
    before = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(before)


class After(L.Callback):
    """Does something after a batch."""

    def __init__(self, batch: int, what) -> None:
        self.batch, self.what = batch, what

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == self.batch:
            self.what()


def test_a_disk_that_fills_up_is_one_line_and_what_is_complete_is_kept(whole, tmp_path):  # noqa: F811
    sizes = [len(content) for content in shards(whole).values()]
    assert max(sizes) > sizes[0]
    with (
        files_of_at_most(sizes[0] + spec.HEADERS),
        pytest.raises(StoreError, match=r"^cannot write to .*: File too large; what is complete is kept"),
    ):
        extract(tmp_path)
    assert 1 <= len(shards(tmp_path)) < len(sizes)
    assert not leftovers(tmp_path)
    extract(tmp_path)
    assert shards(tmp_path) == shards(whole)


def test_a_disk_that_is_full_when_the_manifest_comes(tmp_path):
    with (
        files_of_at_most(100),
        pytest.raises(StoreError, match=r"^cannot write to .*: File too large") as caught,
    ):
        extract(tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK]


def test_what_does_not_fit_is_not_begun(whole, tmp_path, monkeypatch):  # noqa: F811
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(spec.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs 0\.\d+ GiB more and 9\.31e-07 GiB are free; .*layers\)$"):
        extract(tmp_path)
    assert not list(tmp_path.rglob("pass-*"))
    shutil.copytree(whole, tmp_path / "stores")
    next((tmp_path / "stores").rglob("pass-*/manifest.json")).unlink()
    extract(tmp_path / "stores")  # every shard is there: nothing is needed


def test_what_is_reckoned_is_what_is_needed(whole):  # noqa: F811
    store = next(whole.iterdir())
    held = extract(whole)
    width = sum(held.width(site) for site in held.sites)
    found = sum(path.stat().st_size for path in store.rglob("*.h5"))
    rows = type("Planned", (), {"rows": len(held)})()
    count = len(shards(whole))
    most = spec.size(rows, width, "float32") + (count - 1) * spec.HEADERS
    assert most - count * spec.HEADERS < found <= most


@pytest.mark.parametrize("part", ["root", "store", "pass"])
def test_a_closed_folder_is_one_line(part, whole):  # noqa: F811
    with tempfile.TemporaryDirectory() as scratch:  # where another user may look
        root = Path(scratch) / "stores"
        Path(scratch).chmod(0o755)
        shutil.copytree(whole, root)
        store = next(root.iterdir())
        if part == "pass":
            next(store.rglob("shard-00001.h5")).unlink()
        elif part == "root":
            shutil.rmtree(store)
        place = {"root": root, "store": store, "pass": next(store.glob("pass-*"), root)}[part]
        before = sorted(root.rglob("*"))
        for path in (root, *root.rglob("*")):
            path.chmod(0o777)
        with closed(place), pytest.raises(StoreError, match=r"^cannot write to .*: Permission denied"):
            extract(root, ["resid_post.1", "head_z.2", "mlp_out.0"])
        assert [path for path in sorted(root.rglob("*")) if path.name != LOCK] == [
            path for path in before if path.name != LOCK
        ]


def test_a_folder_that_vanishes_is_one_line(whole, tmp_path):  # noqa: F811
    root = tmp_path / "stores"
    gone = After(3, lambda: root.rename(tmp_path / "elsewhere"))
    with pytest.raises(StoreError, match=r"^cannot write to .*: No such file or directory; "):
        extract(root, trainer_kwargs={"callbacks": [gone]})
    extract(root)
    assert shards(root) == shards(whole)


HOLDER = """
import sys, time
from pathlib import Path
from mechdiff.extraction.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_on_one_store(whole, tmp_path, monkeypatch, caplog):  # noqa: F811
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    folder = next(root.iterdir())
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        said = f"process {other.pid} on .* is writing {folder}"
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            with pytest.raises(StoreError, match=rf"^{said}; wait for it \(key: extraction.root\)$"):
                extract(root, ["resid_post.0"])

        class Gone(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                other.stdin.write("\n")  # lets go once the second one says that it waits
                other.stdin.flush()

        log, handler = logging.getLogger("mechdiff.extraction.lock"), Gone()
        log.addHandler(handler)
        try:
            store = extract(root, ["resid_post.0"])
        finally:
            log.removeHandler(handler)
    assert f"process {other.pid} on" in caplog.text
    assert "waiting for it" in caplog.text
    assert [str(site) for site in store.sites] == ["resid_post.0", "resid_post.1", "head_z.2"]


def test_what_a_killed_run_was_writing_is_cleared_away(whole, tmp_path):  # noqa: F811
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    folder = next(root.iterdir())
    for place in (folder, next(folder.glob("pass-*"))):
        (place / ".shard-00000.h5.123.part").write_bytes(b"half")
    extract(root, ["resid_post.0"])
    assert not leftovers(root)
