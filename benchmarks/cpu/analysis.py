"""CKA of all pairs of layers and ridge maps for a grid of lambda, from the stores of a pair."""

from __future__ import annotations

from typing import Any

import h5py
import torch
from torch import Tensor

from benchmarks.cpu.arithmetic import limit
from benchmarks.cpu.bench import Bench
from benchmarks.cpu.extraction import STORES
from benchmarks.peer import Peer
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff.config import LAMBDA_GRID
from mechdiff.data.join import join
from mechdiff.data.manifest import MANIFEST
from mechdiff.data.store import ActivationStore
from mechdiff.functional.cka import cka_from_sums
from mechdiff.functional.clt import RidgePath, ridge_path
from mechdiff.functional.moments import Moments
from mechdiff.functional.r2 import path_sse

GRID = LAMBDA_GRID[:9]
TRAIN = 0.8
BLOCK = 4096
"""Rows that are read at a time."""
SOME = 3
"""One of so many layers is done by the other tool."""
ROWS = "Gram matrices take the square of the rows, the sums the rows alone, and their size depends on neither"
WHAT = "CKA of all layer pairs and maps for 9 lambdas, from the store"


def both_stores(bench: Bench) -> tuple[ActivationStore, ActivationStore]:
    """Open the stores of base and tuned."""
    found = [ActivationStore.open(path.parent) for path in (bench.work / STORES).glob(f"*/{MANIFEST}")]
    base = bench.base.fingerprint
    found.sort(key=lambda store: not store.identity.model.startswith(f"{base}/"))
    source, target = found
    return source, target


def analysed(
    source: ActivationStore, target: ActivationStore, rows: tuple[Tensor, Tensor], train: int
) -> tuple[Tensor, list[RidgePath], list[int], int]:
    """Stream both stores once into sums, and solve from the sums alone.

    Args:
        source: Store of base.
        target: Store of tuned.
        rows: Rows of both that stand for the same places.
        train: How many of them are fitted to; the others choose lambda.

    Returns:
        CKA of the training rows `(layers, layers)`, the maps, the chosen lambdas, and the bytes of all sums.
    """
    names, width = source.sites, source.width(source.sites[0])
    count = len(names)
    # All layers of the target lie side by side: they share one covariance of the source.
    fit = [Moments.zeros(width, count * width) for _ in names]
    own, held = ([Moments.zeros(width, width) for _ in names] for _ in range(2))
    for part in torch.arange(train).split(BLOCK):
        x, y = _read(source, rows[0][part]), _read(target, rows[1][part])
        together = torch.cat(y, 1)
        for layer in range(count):
            fit[layer].update(x[layer], together)
            own[layer].update(y[layer], y[layer])
    for part in torch.arange(train, len(rows[0])).split(BLOCK):
        for sums, x, y in zip(held, _read(source, rows[0][part]), _read(target, rows[1][part]), strict=True):
            sums.update(x, y)
    pairs = [[sums.columns(j * width, (j + 1) * width) for j in range(count)] for sums in fit]
    cka = [
        [cka_from_sums(one.xy, one.xx, other.xx) for one, other in zip(row, own, strict=True)]
        for row in pairs
    ]
    paths = [ridge_path(pairs[layer][layer], GRID, shrink="zero") for layer in range(count)]
    chosen = [int(path_sse(path, sums).argmin()) for path, sums in zip(paths, held, strict=True)]
    kept = sum(part.numel() * 8 for sums in (*fit, *own, *held) for part in sums.tensors().values())
    return torch.stack([torch.stack(row) for row in cka]), paths, chosen, kept


def analysis(bench: Bench) -> None:
    """Measure the analysis of all extracted layers."""
    source, target = both_stores(bench)
    joined = join(source, target)
    rows = joined.source, joined.target
    train, count, width = int(TRAIN * len(rows[0])), len(source.sites), bench.base.width
    path = bench.work / "analysis.h5"
    layers = [site.layer for site in source.sites]
    with h5py.File(path, "w") as file:
        for side, store, index in zip(("source", "target"), (source, target), rows, strict=True):
            for site in store.sites:
                file[f"{side}/{site.layer}"] = store.read(site, index[:train]).numpy()
    some = layers[::SOME]
    job: dict[str, Any] = {"path": str(path), "layers": layers, "some": some, "lambdas": list(GRID)}
    found: list[tuple[Tensor, list[RidgePath], list[int], int]] = []

    def ours() -> Turn:
        return turn(lambda: found.append(analysed(source, target, rows, train)))

    def use(peer: Peer) -> None:
        taken = in_turn({"ours": ours, "theirs": peer.turn}, bench.size.slow)
        cka, paths, chosen, kept = found[-1]
        theirs = peer.result
        places = [
            GRID.index(min(GRID, key=lambda v, w=w: abs(v / w - 1))) for w in theirs["lambdas"].tolist()
        ]
        own = torch.stack([paths[layers.index(n)].map(i).weight for n, i in zip(some, places, strict=True)])
        agree = {
            "cka_difference": float((cka[::SOME] - theirs["cka"]).abs().max()),
            "weights_relative_difference": float((own - theirs["weights"]).norm() / own.norm()),
        }
        assert agree["cka_difference"] < 1e-6, agree
        assert agree["weights_relative_difference"] < 1e-3, agree
        scale = len(layers) / len(some)
        operations = 2.0 * train * width**2
        gram = scale * len(some) * (count + 1) * 2.0 * train**2 * width
        figures = {
            "ours_seconds": median(taken["ours"]),
            "theirs_seconds_scaled": scale * median(taken["theirs"]),
            "layers": count,
            "layers_done_by_theirs": len(some),
            "rows": len(rows[0]),
            "mib_of_sums": kept / 2**20,
            "largest_lambda_chosen": max(GRID[i] for i in chosen),
            **agree,
            "beside": peer.version,
        }
        why = limit(
            gram + operations * 2 * count,
            operations * count * (count + 5),
            (scale * median(taken["theirs"]), median(taken["ours"])),
            bench.rates.get("matmul_float64", bench.rate / 2),
        )
        times = ratio(taken["theirs"], taken["ours"], 10.0, scale)
        bench.keep(WHAT, figures, f"{why}; {ROWS}", over_sklearn_and_gram_loop=times)

    bench.beside(WHAT, "sklearn", job, use)


def _read(store: ActivationStore, rows: Tensor) -> list[Tensor]:
    return [store.read(site, rows).double() for site in store.sites]
