"""A sweep of 24 edits after a block, resumed from cached states, beside full forwards with hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.corpus import corpus
from benchmarks.cpu.arithmetic import limit
from benchmarks.cpu.bench import Bench
from benchmarks.sweep import Sweep, handles
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.pairs.alignment import encode

GOALS = {"all": 4.5, "last": 35.0}


def token_rows(bench: Bench, rows: int, length: int) -> Tensor:
    """Return the ends of rendered prompts, all of one length, `(rows, length)`."""
    encoded = [encode(bench.base.tokenizer, p.text).input_ids for p in corpus(bench.size.texts)]
    long = [ids[-length:] for ids in encoded if len(ids) >= length]
    assert len(long) >= rows, f"{len(long)} prompts have {length} tokens"
    return torch.tensor(long[:rows])


def sweeps(bench: Bench) -> None:
    """Measure both sweeps."""
    depth, size, cost = bench.base.depth, bench.size, bench.cost
    layer = depth * 2 // 3
    engine = SuffixEngine(bench.base.model)
    module = handles(bench.base, layer)
    for positions, rows in zip(("all", "last"), size.prompts, strict=True):
        ids = token_rows(bench, rows, size.length)
        both = Sweep(engine, module, ids, layer, positions)
        ready: list[Any] = []
        kept: dict[str, Tensor] = {}

        def hooks(both: Sweep = both, kept: dict[str, Tensor] = kept) -> Turn:
            return turn(lambda: kept.__setitem__("hooks", both.by_hooks()))

        def clean(both: Sweep = both, ready: list[Any] = ready) -> Turn:
            return turn(lambda: ready.append(both.prepare()))

        def resumed(both: Sweep = both, kept: dict[str, Tensor] = kept, ready: list[Any] = ready) -> Turn:
            return turn(lambda: kept.__setitem__("resumed", both.resumed(*ready[0])))

        clean()
        found = in_turn({"clean": clean, "resumed": resumed, "hooks": hooks}, size.slow + 1)
        difference = (kept["resumed"] - kept["hooks"]).abs().max()
        largest = kept["hooks"].abs().max()
        with torch.no_grad(), intervene(bench.base.model, both.edit(*both.cells[0])):
            same_head = run_logits(bench.base.model, ids)  # a product of other shapes rounds otherwise
        agree = {
            "largest_logit_difference": float(difference),
            "bitwise_equal": torch.equal(kept["resumed"], kept["hooks"]),
            "bitwise_equal_with_the_head_at_the_same_tokens": torch.equal(kept["resumed"][0], same_head),
        }
        assert difference < 1e-3 * largest, agree
        cells, above = len(both.cells), depth - layer - 1
        lengths = [size.length] * rows
        theirs = cells * cost.forward(lengths)
        ours = cells * (
            cost.forward(lengths, above, rows)
            if positions == "all"
            else rows * (above * (cost.block + 4 * cost.width * size.length) + cost.head)
        )
        both_ways = [
            Turn(a.seconds + b.seconds, a.cpu + b.cpu)
            for a, b in zip(found["resumed"], found["clean"], strict=True)
        ]
        figures = {f"{name}_seconds": median(turns) for name, turns in found.items()}
        figures |= {
            "cells": cells,
            "prompts": rows,
            "tokens_each": size.length,
            "after_block": layer,
            **agree,
        }
        bench.keep(
            f"sweep of 24 edits, {positions} positions",
            figures,
            limit(theirs, ours, (median(found["hooks"]), median(found["resumed"])), bench.rate),
            over_hooks_and_full_forwards=ratio(found["hooks"], found["resumed"], GOALS[positions]),
            with_the_clean_run=ratio(found["hooks"], both_ways),
        )
