"""What is read from files of others, as functions of bytes: they load, or refuse in one line."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from safetensors.torch import save

from mechdiff import checkpoints
from mechdiff.callbacks.graded import read_openings
from mechdiff.data.manifest import MANIFEST, Contents, Example, Pass, Shard, StoreIdentity, checksum
from mechdiff.data.prompts import load_prompts
from mechdiff.data.store import ActivationStore
from mechdiff.errors import UsageError
from mechdiff.handles import files
from mechdiff.interventions.sites import Site
from mechdiff.pairs.spec import PairSpec
from mechdiff.results import Results
from mechdiff.study import read_pair
from tests.handles.make import handle

Read = Callable[[bytes], bool]
"""Reads what the bytes say; whether it was accepted."""
WIDTH, ROWS, SITE = 4, 6, Site(1)


def judged(read: Callable[[], Any]) -> bool:
    """Say whether something is read.

    Raises:
        AssertionError: If it is refused in another way than by one line that can be printed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read()
    except UsageError as error:
        line = str(error)
    except SystemExit as left:  # of the parser, which has printed its line
        line = said.getvalue().removesuffix("\n") if left.code == 2 else ""
    else:
        return True
    assert line.isprintable(), line
    assert 0 < len(line) < 2000, line
    return False


@cache
def folder() -> Path:
    """Return a folder for the files, the same for a whole process."""
    return Path(tempfile.mkdtemp(prefix="mechdiff-fuzz-"))


def at(name: str, data: bytes) -> Path:
    """Write a file."""
    path = folder() / name
    path.write_bytes(data)
    return path


@cache
def store() -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Make a small store; return its folder, its manifest and that of its pass."""
    identity = StoreIdentity("m", "t", "c", "p", "all", "float32")
    root = folder() / identity.key
    part = root / Pass.name([SITE])
    part.mkdir(parents=True)
    Contents(identity, [Example(str(i), "en", "target", "t", "s") for i in range(3)], [b"a"], [b"b"]).write(
        root
    )
    with h5py.File(part / "shard-00000.h5", "w") as file:
        for name, kind in (("example", "i4"), ("region", "i1"), ("offset", "i4"), ("position", "i4")):
            file[f"rows/{name}"] = (np.arange(ROWS) % 3 if name != "offset" else np.full(ROWS, -1)).astype(
                kind
            )
        file[f"sites/{SITE}"] = np.ones((ROWS, WIDTH), np.float32)
    shard = Shard("shard-00000.h5", ROWS, checksum(part / "shard-00000.h5"))
    Pass(part, {SITE: WIDTH}, [shard]).write(identity.key)
    bodies = [json.loads((where / MANIFEST).read_text()) for where in (root, part)]
    return root, bodies[0], bodies[1]


def read_manifest(data: bytes) -> bool:
    """Open the small store with another manifest."""
    return _open(data, lambda root, data: (root / MANIFEST).write_bytes(data))


def read_pass(data: bytes) -> bool:
    """Open the small store with another manifest of its pass."""
    return _open(data, lambda root, data: (root / Pass.name([SITE]) / MANIFEST).write_bytes(data))


def _open(data: bytes, change: Callable[[Path, bytes], object]) -> bool:
    root = store()[0]
    copy = folder() / "copy" / root.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    change(copy, data)

    def read() -> None:
        found = ActivationStore.open(copy)
        assert found.read(SITE).shape == (ROWS, WIDTH)
        assert found.groups.shape == (ROWS,)

    return judged(read)


def read_header(data: bytes) -> bool:
    """Read a handle with another manifest in its header."""
    known = handle(kind="mapped").known
    assert known.basis is not None
    assert known.affine is not None
    tensors = {"basis": known.basis, "map_weight": known.affine.weight, "map_bias": known.affine.bias}
    text = data.decode("utf-8", "replace")
    return read_handle(save(tensors, metadata={"format": files.FORMAT, "manifest": text}))


def read_handle(data: bytes) -> bool:
    """Read a handle, and use it."""
    path = at("h.safetensors", data)

    def read() -> None:
        found = files.read(path)
        assert found.change(torch.ones(2, found.manifest.width)).shape == (2, found.manifest.width)

    return judged(read)


TARGETS: dict[str, Read] = {
    "prompts": lambda data: judged(lambda: load_prompts([at("p.jsonl", data)])),
    "openings": lambda data: judged(lambda: read_openings(at("o.jsonl", data))),
    "pair": lambda data: judged(lambda: read_pair(at("pair.yaml", data))),
    "manifest": read_manifest,
    "pass": read_pass,
    "header": read_header,
    "handle": read_handle,
    "results": lambda data: judged(lambda: Results.read(at("r.json", data))),
    "checkpoint": lambda data: judged(lambda: checkpoints.read(str(at("c.ckpt", data)))),
}


@cache
def right(name: str) -> Any:
    """Return what a target accepts, as JSON; for handles and checkpoints as bytes."""
    prompt = {"id": "a", "text": "what is snow", "lang": "en", "label": "target", "split": "fit"}
    record = {"question": "rq1", "quantity": "cka", "value": 0.5, "n": 9, "unit": "fraction"}
    checkpoint = io.BytesIO()
    torch.save({"hyper_parameters": {"_class_path": "x.Y", "sites": ["resid_post.1"]}}, checkpoint)
    return {
        "prompts": lambda: prompt | {"template": "t", "topic": "s", "twin": None, "answer": "4"},
        "openings": lambda: {"lang": "en", "kind": "refuse", "text": "no"},
        "pair": lambda: (
            asdict(PairSpec())
            | {"name": "x", "base": {"id": "a/b"}, "tuned": {"id": "a/c"}, "prompts": ["p"]}
        ),
        "manifest": lambda: store()[1],
        "pass": lambda: store()[2],
        "header": lambda: asdict(handle(kind="mapped").manifest),
        "handle": lambda: files.write(folder() / "right", handle()).read_bytes(),
        "results": lambda: {"schema": 1, "provenance": {"pair": {"name": "x"}}, "records": [record]},
        "checkpoint": checkpoint.getvalue,
    }[name]()


def written(name: str, body: Any) -> bytes:
    """Write what a target reads."""
    if isinstance(body, bytes):
        return body
    if name == "pair":
        return yaml.safe_dump(body, allow_unicode=True).encode("utf-8", "replace")
    return json.dumps(body).encode()
