"""Files are written whole or not at all, and what cannot be written is said in one line."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from mechdiff.checkpoints import WholeFiles
from mechdiff.errors import INTERRUPTED, REFUSED, ConfigError, in_one_line
from mechdiff.files import blocked, whole, write_text
from tests.extraction.test_disk import files_of_at_most


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first")

    def half() -> None:
        with whole(path) as part:
            part.write_text("sec")
            assert path.read_text() == "first"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert path.read_text() == "first"
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_vanishes_is_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    path.parent.mkdir()

    def lose() -> None:
        with whole(path) as part:
            part.write_text("x")
            part.unlink()
            path.parent.rmdir()

    with pytest.raises(OSError, match="No such file") as caught:
        lose()
    assert (blocked(caught.value) or "").startswith(f"cannot write or read {path.parent}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "cannot write or read /x/y: No space left",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "cannot write or read /x: Permission"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write or read: Read-only file system"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone/y"), "cannot write or read /gone/y: No such"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb() -> int:
        raise error

    assert in_one_line(verb)() == REFUSED
    line = capsys.readouterr().err
    assert line.startswith(f"mechdiff: {said}")
    assert line.count("\n") == 1


def test_what_is_no_fault_of_the_place_is_not_hidden(tmp_path: Path) -> None:
    def verb() -> int:
        return int((tmp_path / "nothing").read_text())

    with pytest.raises(FileNotFoundError):
        in_one_line(verb)()


@pytest.mark.parametrize("later", [False, True])
def test_what_tensorboard_cannot_write_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], later: bool
) -> None:
    """Its thread fails, which alone would be a traceback."""
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    writer = SummaryWriter(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def verb() -> int:
        monkeypatch.setattr(RecordWriter, "write", full)
        writer.add_scalar("x", 1.0)
        if later:
            time.sleep(0.2)
        writer.flush()
        return 0

    assert in_one_line(verb)() == REFUSED
    assert capsys.readouterr().err == "mechdiff: cannot write or read: No space left on device\n"
    assert not seen
    assert threading.excepthook == seen.append


def test_other_faults_of_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def verb() -> int:
        for error in (ValueError("x"), OSError(errno.ENOSPC, "no room, and nobody else knows")):
            thread = threading.Thread(target=raises, args=[error])
            thread.start()
            thread.join()
        return 0

    def raises(error: Exception) -> None:
        raise error

    assert in_one_line(verb)() == 0
    assert [args.exc_type for args in seen] == [ValueError, OSError]


def test_an_interrupt_and_a_mistake_have_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - what Lightning makes of it

    def wrong() -> int:
        raise ConfigError("no (key: x)")

    def ends() -> int:
        raise SystemExit(143)

    assert in_one_line(told)() == INTERRUPTED
    assert in_one_line(wrong)() == REFUSED
    assert capsys.readouterr().err.splitlines() == [
        "mechdiff: interrupted; what is complete is kept, and the same command goes on",
        "mechdiff: no (key: x)",
    ]
    with pytest.raises(SystemExit) as left:
        in_one_line(ends)()
    assert left.value.code == 143


def test_of_several_processes_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> int:
        raise ConfigError("no")

    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert in_one_line(wrong)() == REFUSED
    assert not capsys.readouterr().err


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path, weights = tmp_path / "checkpoints" / "last.ckpt", {"weight": torch.arange(50000.0)}
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        WholeFiles().save_checkpoint(weights, path)
    assert not list(path.parent.iterdir())
    WholeFiles().save_checkpoint(weights, path)
    assert torch.equal(WholeFiles().load_checkpoint(path)["weight"], weights["weight"])
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        WholeFiles().save_checkpoint({"weight": torch.zeros(50000)}, path)
    assert torch.equal(WholeFiles().load_checkpoint(path)["weight"], weights["weight"])
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
