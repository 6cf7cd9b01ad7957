"""Say what a run would cost before it is run: operations, bytes on disk, time, and how each grows.

1. The batches of the extraction are planned as they would be run; operations and bytes follow from them: two
   operations for each weight of the blocks that are run and each token, and attention to what comes before.
2. Batches are run for two seconds, those of middle length first, and the others are taken to be as fast.
3. A fit in closed form says itself how many operations it takes; their rate is that of a matrix product in
   float64. What is measured on the pair afterwards is not reckoned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from typing import NoReturn

import torch
from jsonargparse import Namespace

from mechdiff import prepare
from mechdiff.data.prompts import Prompt, select
from mechdiff.extraction.plan import Plan, encode_prompts
from mechdiff.extraction.spec import ExtractionSpec, width
from mechdiff.interventions.hooks import get_blocks, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import run
from mechdiff.pairs.loading import LoadedModel, LoadedPair

ABOUT = "Print what the run would cost (operations, disk, time, and how they grow), and end."
PROBE = 2.0
"""Seconds that a probe takes, and one batch at least."""
BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Extraction:
    """What the extraction of one model costs.

    Attributes:
        rows: Rows that are kept.
        tokens: Tokens that are run, padding included.
        operations: Floating-point operations.
        stored: Bytes on disk.
        seconds: Expected time, without start-up.
    """

    rows: int
    tokens: int
    operations: float
    stored: int
    seconds: float


def stored_bytes(rows: int, columns: int, dtype: str) -> int:
    """Return the bytes of a store.

    Args:
        rows: Its rows.
        columns: Width of all sites together.
        dtype: Type on disk.
    """
    return rows * columns * BYTES[dtype]


def extraction(
    model: LoadedModel, texts: Sequence[Prompt], sites: Sequence[Site], spec: ExtractionSpec
) -> Extraction:
    """Reckon one model's extraction, and run some of its batches.

    Args:
        model: The model.
        texts: What would be extracted.
        sites: Where.
        spec: How.

    Raises:
        PromptError: If a prompt does not fit into the model.
    """
    encoded = encode_prompts(model.tokenizer, texts, model.context_length)
    plan = Plan(encoded, spec.positions, spec.tokens_per_batch, spec.batches_per_shard)
    count = max(site.layer for site in sites) + 1
    weights = sum(
        p.numel() for block in list(get_blocks(model.model))[:count] for p in block.parameters() if p.ndim > 1
    )
    tokens = sum(shard.padded for shard in plan.shards)
    lengths = [
        max(len(encoded[example]) for example in batch)
        for shard in plan.shards
        for batch in shard.batches
        for _ in batch
    ]
    seen = sum((n - plan.fixed) * (n + plan.fixed + 1) / 2 for n in lengths)
    heads = model.num_heads * model.head_dim
    rows = sum(shard.rows for shard in plan.shards)
    columns = sum(width(model, site) for site in sites)
    return Extraction(
        rows,
        tokens,
        2.0 * weights * tokens + 4.0 * heads * count * seen,
        stored_bytes(rows, columns, spec.dtype),
        tokens / _rate(model, plan, count - 1),
    )


def outlook(
    pair: LoadedPair,
    prompts: Sequence[Prompt],
    roles: Mapping[str, Sequence[Site]],
    spec: ExtractionSpec,
    fit: Callable[[int], float | None],
) -> Iterator[str]:
    """Yield what a run would cost, line by line.

    Args:
        pair: The models.
        prompts: All prompts; those of split ``fit`` are extracted.
        roles: Sites of base (``source``) and tuned (``target``); empty if nothing is stored.
        spec: How they are extracted.
        fit: Operations of the fit for a number of rows; None if they are not known.
    """
    texts = select(prompts, "fit") if roles else []
    seconds, rows = 0.0, 0
    for role, model in (("source", pair.base), ("target", pair.tuned)):
        if role not in roles:
            continue
        sites = roles[role]
        cost = extraction(model, texts, sites, spec)
        seconds, rows = seconds + cost.seconds, max(rows, cost.rows)
        yield f"extract {model.role}: {len(texts)} texts, {cost.tokens} tokens with padding"
        yield f"  {len(sites)} sites up to block {max(s.layer for s in sites)}, {cost.rows} rows"
        stored = f"{cost.stored / GIB:.3g} GiB on disk"
        yield f"  {cost.operations / 1e12:.3g} TFLOP, {stored}, {cost.seconds:.3g} s"
    if roles:
        yield "  twice the texts: twice the operations, the bytes and the time"
        yield "  twice the sites: twice the bytes; operations and time follow the highest block"
        yield "  twice the width: 4 times the operations, twice the bytes"
    operations = fit(rows)
    if operations is None:
        yield "fit: not reckoned"
    else:
        took = operations / _product_rate(pair.base.device)
        seconds += took
        yield f"fit: {operations / 1e12:.3g} TFLOP in float64, {took:.3g} s"
        yield "  it grows with rows, sites and the square of the width; the grid of lambda shares its sums"
    rest = "start-up and what is measured on the pair not reckoned"
    yield f"in all {seconds:.3g} s on {pair.base.device}, {rest}"


def tell(
    pair: LoadedPair,
    prompts: Sequence[Prompt],
    roles: Mapping[str, Sequence[Site]],
    spec: ExtractionSpec,
    config: Namespace,
) -> NoReturn:
    """Print what a configured run would cost, and end.

    Args:
        pair: The models.
        prompts: All prompts.
        roles: Sites by role.
        spec: How states are extracted.
        config: The configuration of the run.

    Raises:
        SystemExit: Always, with 0.
    """
    module, _, name = config.model.class_path.rpartition(".")
    matrix = bool(config.model.init_args.get("matrix"))
    widths = width(pair.base, roles["source"][0]), width(pair.tuned, roles["target"][0])

    def fit(rows: int) -> float | None:
        found: float | None = getattr(import_module(module), name).operations(
            rows, len(roles["target"]), *widths, matrix
        )
        return found

    for line in outlook(pair, prompts, roles if prepare.needs_states(config.data) else {}, spec, fit):
        print(line)
    raise SystemExit(0)


@torch.no_grad()
def _rate(model: LoadedModel, plan: Plan, last: int) -> float:
    """Run batches for some seconds; return tokens a second, padding included."""
    items = [(shard, number) for shard in plan.shards for number in range(len(shard.batches))]
    middle = len(items) // 2
    tokens, begun = 0, time.perf_counter()
    with stop_after(model.model, last):
        for shard, number in cycle(items[middle:] + items[:middle]):
            ids = plan.batch(shard, number, model.tokenizer.pad_token_id).input_ids
            ids = ids[:, plan.fixed :].to(model.device)
            run(model.model, ids)
            tokens += ids.numel()
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            if time.perf_counter() - begun > PROBE:
                return tokens / (time.perf_counter() - begun)
    raise AssertionError("a plan has batches")


def _product_rate(device: torch.device, size: int = 1024) -> float:
    """Return operations a second of a matrix product in float64."""
    a = torch.ones(size, size, dtype=torch.float64, device=device)
    a @ a
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < PROBE / 10:
        (a @ a)[0, 0].item()
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - begun)
