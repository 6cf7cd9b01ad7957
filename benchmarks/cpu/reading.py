"""Reading shuffled training batches from the stores of a pair, beside one row at a time and beside a copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from benchmarks.cpu.analysis import both_stores
from benchmarks.cpu.bench import Bench
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff.data.activations import RUN, ActivationPairs
from mechdiff.data.store import ActivationStore

SITES = 2
"""Sites of each store that are read."""
EPOCHS = 10
"""Times that all rows are read in a turn; row by row they are read once."""


def reading(bench: Bench) -> None:
    """Measure an epoch of training batches."""
    source, target = both_stores(bench)
    sites = [str(site) for site in source.sites[:SITES]]
    data = ActivationPairs(
        str(source.folder),
        str(target.folder),
        sites=sites,
        tokens=None,
        val_frac=0.01,
        batch_size=bench.size.batch,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    wanted = list(loader.sampler)
    joined = data.joined
    kept: dict[str, dict[str, Tensor]] = {}

    def ours() -> Turn:
        def epochs() -> None:
            for _ in range(EPOCHS):
                for batch in loader:
                    kept.setdefault("ours", batch["target"])

        return turn(epochs)

    merged = _merged(source, target, sites, bench.work / "rows.h5")

    def by_row() -> Turn:
        def epoch() -> None:
            with h5py.File(merged, "r") as file:
                for rows in wanted:
                    for side, places in (("source", joined.source), ("target", joined.target)):
                        found = {
                            name: torch.from_numpy(
                                np.stack([file[f"{side}/{name}"][i] for i in places[rows].tolist()])
                            )
                            for name in sites
                        }
                    kept.setdefault("by_row", found)

        return turn(epoch)

    memory = {
        (side, name): store.read(name)
        for side, store in (("source", source), ("target", target))
        for name in sites
    }

    def copied() -> Turn:
        """Copy as many contiguous rows, batch by batch, out of memory."""

        def epochs() -> None:
            for _ in range(EPOCHS):
                for index in wanted:
                    for rows in memory.values():
                        rows[: len(index)].clone()

        return turn(epochs)

    def long_read() -> Turn:
        """Read as many bytes of the files in their order, one request for each array of a shard."""

        def epochs() -> None:
            for _ in range(EPOCHS):
                for path, begin, size in arrays:
                    with path.open("rb", buffering=0) as file:
                        file.seek(begin)
                        assert file.readinto(np.empty(size, np.uint8).data) == size

        return turn(epochs)

    arrays = [
        (path, begin, size * sum(map(len, wanted)) // len(store))
        for store in (source, target)
        for name in sites
        for path, begin, size in _arrays(store, name)
    ]
    ours()  # files are in memory from here on
    found = in_turn(
        {"copied": copied, "long_read": long_read, "ours": ours, "by_row": by_row},
        bench.size.rounds,
        {"by_row": bench.size.slow},
    )
    same = all(torch.equal(kept["ours"][name], kept["by_row"][name]) for name in sites)
    assert same, "rows read one by one differ"
    size = sum(map(len, wanted)) * 2 * len(sites) * bench.base.width * 4
    times = {"by_row": 1}
    figures = {f"{name}_seconds": median(t) / times.get(name, EPOCHS) for name, t in found.items()}
    figures |= {"batches": len(wanted), "rows": sum(map(len, wanted)), "mb": size / 1e6}
    figures |= {"ours_gb_per_s": EPOCHS * size / 1e9 / median(found["ours"]), "same_bits": same}
    moved = 2 * size / bench.rates.get("copy", float("inf"))
    why = (
        "a row is copied twice, from the file into the processor's cache and from there to its place; "
        f"once, at the rate of a copy, the {size / 1e6:.0f} MB of an epoch take {moved:.4f} s; the rest is "
        f"sorting rows, opening files and a request for each run of {RUN} rows"
    )
    bench.keep(
        f"reading a store, shuffled batches of {bench.size.batch} rows",
        figures,
        why,
        over_rows_by_h5py=ratio(found["by_row"], found["ours"], 20.0, EPOCHS),
        share_of_a_long_read=ratio(found["long_read"], found["ours"], 0.8),
        share_of_a_copy=ratio(found["copied"], found["ours"], 0.8),
    )


def _arrays(store: ActivationStore, name: str) -> Iterator[tuple[Path, int, int]]:
    """Yield where the arrays of a site lie: file, first byte, bytes."""
    for path in sorted(store.folder.rglob("*.h5")):
        with h5py.File(path, "r") as file:
            if f"sites/{name}" in file:
                data = file[f"sites/{name}"]
                yield path, data.id.get_offset(), data.nbytes


def _merged(source: ActivationStore, target: ActivationStore, sites: list[str], path: Path) -> Path:
    """Write the same rows as someone would who reads them one by one: one data set for each site."""
    with h5py.File(path, "w") as file:
        for side, store in (("source", source), ("target", target)):
            for name in sites:
                file[f"{side}/{name}"] = store.read(name).numpy()
    return path
