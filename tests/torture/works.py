"""What is tortured, with tiny models: extraction by one and by two processes, a fit, a study and a report."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml

from mechdiff import checkpoints
from mechdiff.__main__ import main
from mechdiff.data.manifest import MANIFEST, checksum, read_json
from mechdiff.data.store import ActivationStore
from mechdiff.errors import UsageError
from mechdiff.results import Results
from tests.extraction import job
from tests.reporting.report import make_study
from tests.torture.harness import Work
from tests.workspace import ROOT, config, run, small, workspace

EPOCHS = 3


def works(place: Path) -> list[Work]:
    """Make the models and prompts that all of them use; return them.

    Args:
        place: An empty folder.
    """
    pair, configs = workspace(place), plain_configs(place / "configs")
    measured = make_study.study(place / "measured")
    report = partial(_report, measured)
    return [
        Work("extraction", partial(_extract, 1), _shards, _bad_stores, _files, _rows_twice),
        Work("extraction, 2 processes", partial(_extract, 2), _shards, _bad_stores, _files, _rows_twice, 2),
        Work("fit", partial(_fit, pair), _epochs, _bad_runs, _fitted, _records_twice),
        Work("study", partial(_study, pair, configs), _done, _bad_runs, _tables, _records_twice),
        Work("report", report, lambda folder: {}, _bad_pages, _pages, lambda folder: 0),
    ]


def plain_configs(folder: Path) -> Path:
    """Write configurations of RQ1 and RQ2 that run no language model after a fit; return their folder."""
    folder.mkdir()
    for name in ("rq1", "clt"):
        body = yaml.safe_load((ROOT / "configs" / f"{name}_cultural.yaml").read_text())
        body["trainer"]["callbacks"] = []
        body["data"].setdefault("init_args", {})["tokens"] = None
        del body["pair"]
        (folder / f"{name}_cultural.yaml").write_text(yaml.safe_dump(body))
    return folder


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Hash the files whose names match."""
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in found}


# --- extraction ----------------------------------------------------------------------------------------


def _extract(ranks: int, folder: Path) -> int:
    job.main(str(folder), str(ranks))
    return 0


def _shards(folder: Path) -> dict[str, object]:
    """Return the shards with a record, and the manifests."""
    found: dict[str, object] = dict(digests(folder, MANIFEST))
    for record in folder.rglob("shard-*.json"):
        with contextlib.suppress(UsageError):
            found[str(record.relative_to(folder))] = (read_json(record)["xxh3"], _hash(record))
    return found


def _hash(record: Path) -> str:
    shard = record.with_suffix(".h5")
    return checksum(shard) if shard.is_file() else "missing"


def _bad_stores(folder: Path) -> list[str]:
    bad = []
    for path in folder.rglob("*.json"):
        if path.name.startswith("."):
            continue
        try:
            body = read_json(path)
        except UsageError as error:
            bad.append(str(error))
            continue
        if path.name != MANIFEST and _hash(path) != body["xxh3"]:
            bad.append(f"{path} is not the record of its shard")
    for store in folder.glob(f"*/{MANIFEST}"):
        if list(store.parent.glob(f"pass-*/{MANIFEST}")):
            try:
                ActivationStore.open(store.parent)
            except UsageError as error:
                bad.append(str(error))
    return bad


def _files(folder: Path) -> dict[str, str]:
    return digests(folder, "*.h5", "*.json")


def _rows_twice(folder: Path) -> int:
    """Count rows that a store holds twice."""
    rows = ActivationStore.open(next(folder.iterdir())).rows
    seen = Counter(zip(rows.example.tolist(), rows.position.tolist(), strict=True))
    return sum(seen.values()) - len(seen)


# --- runs ----------------------------------------------------------------------------------------------


def _fit(pair: Path, folder: Path) -> int:
    """Fit by gradient descent, from the last checkpoint if there is one."""
    kept = {"monitor": "val/loss", "save_last": True, "filename": "best"}
    few = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}]
    options = ["--layers=[1]", "--data.batch_size=100", f"--trainer.max_epochs={EPOCHS}", "--ckpt_path=last"]
    callbacks = f"--trainer.callbacks={json.dumps(few)}"
    return run("fit", *config("clt_cultural_sgd"), *small(pair, folder), *options, callbacks)


def _study(pair: Path, configs: Path, folder: Path) -> int:
    options = [f"--extraction.root={folder / 'stores'}", "--trainer.accelerator=cpu", "--layers=[1]"]
    asked = ["--questions", "1,2", f"--configs={configs}", "--no-figures"]
    return main(["study", "--pair", str(pair), "--out", str(folder / "study"), *asked, *options])


def _report(measured: Path, folder: Path) -> int:
    return main(["report", str(measured), "--out", str(folder / "page"), "--no-figures"])


def _epochs(folder: Path) -> dict[str, object]:
    """Return how far the last checkpoint is: only more than before may take its place."""
    last = sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    epochs = [torch.load(path, weights_only=True, mmap=True)["epoch"] for path in last]
    return {f"epoch {epoch}": True for epoch in range(max(epochs, default=-1) + 1)} | _shards(folder)


def _done(folder: Path) -> dict[str, object]:
    """Return the questions that are done, with their tables, and the shards."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("done.json")}
    return {name: digests((folder / name).parent, "results.json") for name in found} | _shards(folder)


def _bad_runs(folder: Path) -> list[str]:
    readers: dict[str, Callable[[Path], object]] = {
        "results.json": Results.read,
        "done.json": lambda path: json.loads(path.read_text()),
        "study.json": lambda path: json.loads(path.read_text()),
        "items.parquet": pq.read_table,
        "*.ckpt": lambda path: checkpoints.read(str(path)),
    }
    bad = []
    for pattern, read in readers.items():
        for path in folder.rglob(pattern):
            try:
                read(path)
            except Exception as error:
                bad.append(f"{path}: {error}")
    return bad + _bad_stores(folder / "stores") + _bad_pages(folder)


def _bad_pages(folder: Path) -> list[str]:
    pages = [p for p in folder.rglob("report.html") if not p.read_text().rstrip().endswith("</html>")]
    return [f"{path} is cut off" for path in pages]


def _newest(folder: Path, name: str) -> Path:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime_ns)


def _fitted(folder: Path) -> object:
    states = torch.load(_newest(folder, "last.ckpt"), weights_only=True)["state_dict"]
    weights = {name: hashlib.md5(value.numpy().tobytes()).hexdigest() for name, value in states.items()}
    table = json.loads(_newest(folder, "results.json").read_text())["records"]
    return weights, table, digests(folder / "stores", "*.h5", "*.json")


def _tables(folder: Path) -> object:
    tables = {
        str(path.relative_to(folder)): json.loads(path.read_text())["records"]
        for path in folder.rglob("results.json")
    }
    return tables, digests(folder / "stores", "*.h5", "*.json"), len(list(folder.rglob("report.html")))


def _pages(folder: Path) -> dict[str, str]:
    return digests(folder / "page", "*")


def _keys(folder: Path) -> Iterator[tuple[str, ...]]:
    for path in folder.rglob("results.json"):
        yield from ((str(path.parent), *record.key) for record in Results.read(path))


def _records_twice(folder: Path) -> int:
    seen = Counter(_keys(folder))
    return sum(seen.values()) - len(seen)
