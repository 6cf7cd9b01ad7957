"""Extraction to disk beside a bare forward pass and other tools, both models of a pair, and memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.corpus import corpus
from benchmarks.cpu.arithmetic import limit
from benchmarks.cpu.bench import Bench
from benchmarks.peer import NotMeasured, Peer
from benchmarks.shapes import ROOT
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff import prepare
from mechdiff.data.manifest import MANIFEST
from mechdiff.data.store import ActivationStore
from mechdiff.extraction import extractor
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.plan import Plan, encode_prompts
from mechdiff.interventions.hooks import stop_after
from mechdiff.interventions.suffix import prefill, run
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel

QUIET = {"enable_progress_bar": False}
GOALS = {"hidden_states": 3.5, "nnsight": 3.5, "transformer_lens": 4.0, "seed_loop": 25.0}
WHAT = "extraction, all positions, to disk"
STORES = "pair"
"""Name of the stores that later parts read."""


def extraction(bench: Bench) -> None:
    """Measure extraction of every other layer."""
    texts, sites = corpus(bench.size.texts), bench.sites
    layers = [site.layer for site in sites]
    encoded = [encode(bench.base.tokenizer, p.text) for p in texts]
    job: dict[str, Any] = {
        "model": bench.folder,
        "ids": [e.input_ids for e in encoded],
        "layers": layers,
        "pad": bench.base.tokenizer.pad_token_id,
    }
    root, model = bench.work / "one", bench.base.model
    stores: list[ActivationStore] = []

    def ours() -> Turn:
        extractor._PLANS.clear()
        shutil.rmtree(root, ignore_errors=True)
        return turn(
            lambda: stores.append(
                ensure_store(bench.base, texts, sites, bench.spec("one"), trainer_kwargs=QUIET)
            )
        )

    _warm(bench, bench.base)
    few = corpus(bench.size.few)
    share = sum(map(len, job["ids"])) / sum(map(len, job["ids"][: len(few)]))
    ways: dict[str, Callable[[], Turn]] = {
        "ours": ours,
        "bare": lambda: turn(lambda: _bare(bench, layers[-1])),
        "hidden_states": lambda: turn(
            lambda: peers.hidden_states(model, job, bench.work / "hidden_states.h5")
        ),
        "seed_loop": lambda: turn(lambda: _seed_loop(model, job["ids"][: len(few)], layers)),
    }
    workers, once = _workers(bench, job), {}
    for name, worker in workers.items():
        ways[name] = worker.turn
        once[name] = 1 if name.endswith("_stopped") else bench.size.slow
    try:
        fewer = {"hidden_states": bench.size.slow, "seed_loop": bench.size.slow, **once}
        found = in_turn(ways, bench.size.rounds, fewer)
    finally:
        for worker in workers.values():
            worker.close()
    store, lengths = stores[-1], [len(e) for e in encoded]
    files = {name: bench.work / f"{name}.h5" for name in ("hidden_states", *workers)}
    agree = {
        f"{name}_relative_difference": _apart(store, path, lengths, layers) for name, path in files.items()
    }
    assert max(agree.values()) < 1e-3, agree
    plan, cost = _plan(bench), bench.cost
    blocks = layers[-1] + 1
    own = [max(len(encoded[e]) for e in b) - plan.fixed for s in plan.shards for b in s.batches for e in b]
    theirs = [len(e) for e in encoded]
    padded = [max(theirs[i - i % 8 : i - i % 8 + 8]) for i in range(len(theirs))]
    size = len(store) * len(sites) * bench.base.width * 4
    figures: dict[str, Any] = {f"{name}_seconds": median(turns) for name, turns in found.items()}
    figures |= {"texts": len(texts), "tokens": sum(theirs), "rows": len(store), "sites": len(sites)}
    figures |= {"written_mb": size / 1e6, **agree}
    figures |= {"beside": ", ".join(dict.fromkeys(worker.version for worker in workers.values()))}
    disk = size / bench.rates.get("disk", float("inf"))
    written = f"{size / 1e6:.0f} MB take {disk:.2f} s at the rate of the disk"
    ops = limit(
        cost.forward(padded, blocks),
        cost.forward(own, blocks, 0),
        (median(found["hidden_states"]), median(found["ours"])),
        bench.rate,
    )
    ratios = {
        name: ratio(turns, found["ours"], GOALS.get(name), share if name == "seed_loop" else 1.0)
        for name, turns in found.items()
        if name not in ("ours", "bare")
    }
    ratios |= {"time_over_bare_forward": ratio(found["ours"], found["bare"], 1.05, at_most=True)}
    bench.keep(WHAT, figures, f"{ops}; {written}", **ratios)
    for name in ("nnsight", "transformer_lens"):
        if name not in workers:
            bench.missing(f"{WHAT}: {name}", (bench.work / f"{name}.missing").read_text())


def _warm(bench: Bench, model: LoadedModel) -> None:
    """Extract a little: what a process does once, such as reading the vocabulary, is not counted."""
    ensure_store(
        model, corpus(bench.size.few), bench.sites, bench.spec(f"warm-{model.role}"), trainer_kwargs=QUIET
    )


def _workers(bench: Bench, job: dict[str, Any]) -> dict[str, Peer]:
    """Start the other tools, each as it is and ending after the last wanted block."""
    found: dict[str, Peer] = {}
    for name in ("nnsight", "transformer_lens"):
        for stop in (False, True):
            key = f"{name}_stopped" if stop else name
            own = {**job, "stop": stop, "path": str(bench.work / f"{key}.h5")}
            room = bench.work / key
            try:
                found[key] = Peer(name, own, room, bench.peers)
            except NotMeasured as reason:
                (bench.work / f"{key}.missing").write_text(str(reason))
    return found


def _plan(bench: Bench) -> Plan:
    spec, base = bench.spec("one"), bench.base
    encoded = encode_prompts(base.tokenizer, corpus(bench.size.texts), base.context_length)
    return Plan(encoded, spec.positions, spec.tokens_per_batch, spec.batches_per_shard)


@torch.no_grad()
def _bare(bench: Bench, last: int) -> None:
    """Run the same batches up to the same block, and keep nothing."""
    plan, model = _plan(bench), bench.base.model
    start = plan.encoded[0].input_ids[: plan.fixed]
    prefix = prefill(model, torch.tensor([start])) if start else None
    with stop_after(model, last):
        for shard in plan.shards:
            for number in range(len(shard.batches)):
                batch = plan.batch(shard, number, bench.base.tokenizer.pad_token_id)
                run(model, batch.input_ids[:, plan.fixed :], prefix=prefix)


@torch.no_grad()
def _seed_loop(model: Any, ids: list[list[int]], layers: list[int]) -> dict[int, list[Tensor]]:
    """Read the last token of every text layer by layer: a whole forward with a hook for each of both."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for layer in layers:

        def keep(_module: Any, _args: Any, output: Any, layer: int = layer) -> None:
            found[layer].append((output[0] if isinstance(output, tuple) else output)[0, -1].clone())

        handle = model.model.layers[layer].register_forward_hook(keep)
        for text in ids:
            model(input_ids=torch.tensor([text]))
        handle.remove()
    return found


def _apart(store: ActivationStore, path: Path, lengths: list[int], layers: list[int]) -> float:
    """Return the largest relative difference of a row between a store and another tool's file."""
    begin = torch.tensor([0, *lengths]).cumsum(0)
    index = begin[store.rows.example] + store.rows.position
    worst = 0.0
    with h5py.File(path, "r") as file:
        for layer in layers:
            theirs = torch.from_numpy(file[f"states/{layer}"][:])[index]
            ours = store.read(f"resid_post.{layer}")
            worst = max(worst, float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()))
    return worst


def pair(bench: Bench) -> None:
    """Extract both models of the pair, beside one of them twice; the stores stay."""
    texts, sites = corpus(bench.size.pair_texts), bench.sites
    both = {"source": sites, "target": sites}
    stores: list[dict[str, ActivationStore]] = []

    def two() -> Turn:
        extractor._PLANS.clear()
        shutil.rmtree(bench.work / STORES, ignore_errors=True)
        spec = bench.spec(STORES)
        return turn(
            lambda: stores.append(prepare.fill_stores(bench.pair, texts, both, spec, {}, dict(QUIET)))
        )

    def one() -> Turn:
        extractor._PLANS.clear()
        shutil.rmtree(bench.work / "one", ignore_errors=True)
        return turn(lambda: ensure_store(bench.base, texts, sites, bench.spec("one"), trainer_kwargs=QUIET))

    for model in (bench.base, bench.pair.tuned):
        _warm(bench, model)
    found = in_turn({"both": two, "one": one}, bench.size.rounds)
    (manifest,) = (bench.work / "one").glob(f"*/{MANIFEST}")
    single = ActivationStore.open(manifest.parent)
    source = stores[-1]["source"]
    same = all(torch.equal(single.read(site), source.read(site)) for site in sites)
    assert same, "the store of a pair differs from that of one model"
    rows = [len(store) for store in stores[-1].values()]
    figures = {"both_seconds": median(found["both"]), "one_seconds": median(found["one"])}
    figures |= {"source_rows": rows[0], "target_rows": rows[1], "same_bits": float(same)}
    bench.keep(
        "both models of a pair, the same texts",
        figures,
        "the two run equally many operations; what is shared is tokenising, planning and the loop's start",
        over_twice_one=ratio(found["both"], found["one"], 1.0, 0.5, at_most=True),
    )


def memory(bench: Bench) -> None:
    """Compare the largest resident memory of an extraction with that on ten times as many texts."""
    found = {}
    for repeat in (1, 10):
        room = bench.work / f"memory-{repeat}"
        command = [sys.executable, "-m", "benchmarks.cpu.memory", str(bench.file), str(room)]
        command += [str(bench.size.texts // 2), str(repeat)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if said.returncode:
            raise RuntimeError(said.stderr[-2000:])
        rows, kib = said.stdout.split()[-2:]
        found[repeat] = {"rows": int(rows), "resident_mib": int(kib) / 1024}
        shutil.rmtree(room, ignore_errors=True)
    one, ten = found[1]["resident_mib"], found[10]["resident_mib"]
    figures = {f"{what}_with_few": value for what, value in found[1].items()}
    figures |= {f"{what}_with_many": value for what, value in found[10].items()}
    grown = {"value": ten / one, "low": ten / one, "high": ten / one, "goal": 1.05, "at_most": True}
    why = f"{ten - one:.0f} MiB more: names, token ids and regions of every text are held"
    bench.keep(
        "resident memory of an extraction on 10 times as many texts", figures, why, over_that_of_few=grown
    )
