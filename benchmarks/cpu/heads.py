"""Exact patching and attribution of all heads, and integrated gradients, beside what they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.arithmetic import limit
from benchmarks.cpu.bench import Bench
from benchmarks.cpu.sweeps import token_rows
from benchmarks.peer import Peer
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff.interventions.attribution import attribute, integrated_gradients
from mechdiff.interventions.head_patching import patch_heads
from mechdiff.interventions.head_runs import ZERO, Baseline, Batch, clean_states, parts
from mechdiff.interventions.suffix import SuffixEngine

TOKENS = 24
MANY = 4
"""Prompts of the larger batch."""
NODES = 5
EVERY = 3
"""On the larger batch one of so many layers is patched by full forwards."""


def heads(bench: Bench) -> None:
    """Measure patching and attribution on one prompt, and patching on several at once."""
    base, model, cost = bench.base, bench.base.model, bench.cost
    engine, slow = SuffixEngine(model), bench.size.slow
    length = min(TOKENS, bench.size.length)
    for rows, every in ((1, 1), (MANY, EVERY)):
        if rows > bench.size.prompts[0]:
            continue
        ids = token_rows(bench, rows, length)
        batch = Batch(ids, where=torch.ones_like(ids, dtype=torch.bool))
        layers = list(range(0, base.depth, every))
        kept: dict[str, Any] = {}

        def exact(batch: Batch = batch, kept: dict[str, Any] = kept) -> Turn:
            return turn(lambda: kept.__setitem__("exact", _patched(engine, batch)))

        def hooks(ids: Tensor = ids, layers: list[int] = layers, kept: dict[str, Any] = kept) -> Turn:
            return turn(lambda: kept.__setitem__("hooks", _by_hooks(model, ids, layers, base.num_heads)))

        def first(batch: Batch = batch, kept: dict[str, Any] = kept) -> Turn:
            return turn(lambda: kept.__setitem__("first", attribute(model, batch, _score, {"zero": ZERO})))

        found = in_turn({"exact": exact, "first": first, "hooks": hooks}, slow)
        share = base.depth / len(layers)
        clean = clean_states(model, batch).logits
        answer = clean.argmax(-1)
        logits = kept["exact"][layers]
        difference = float((logits - kept["hooks"]).abs().max())
        assert difference < 1e-3 * float(clean.abs().max()), difference
        effects = (_score(clean) - _score(logits, answer)).movedim(-1, 0).flatten()
        guessed = kept["first"].values["zero"][:, layers].flatten()
        r = float(torch.corrcoef(torch.stack([guessed, effects.double()]))[0, 1])
        count = base.depth * base.num_heads
        lengths = [length] * rows
        full = count * cost.forward(lengths)
        mean_blocks = (base.depth - 1) / 2 + 2 / 3  # above the layer, and that layer's MLP
        ours = count * cost.forward(lengths, mean_blocks, rows) + cost.forward(lengths)
        times = {name: median(turns) for name, turns in found.items()}
        prompts = f"{rows} prompt{'s' * (rows > 1)}"
        about = {"heads": count, "prompts": rows, "tokens_each": length}
        bench.keep(
            f"exact patching of all heads, {prompts}",
            {
                "ours_seconds": times["exact"],
                "hooks_seconds_scaled": share * times["hooks"],
                **about,
                "heads_done_by_hooks": len(layers) * base.num_heads,
                "largest_logit_difference": difference,
            },
            limit(full, ours, (share * times["hooks"], times["exact"]), bench.rate),
            over_hooks_and_full_forwards=ratio(found["hooks"], found["exact"], 8.0, share),
        )
        backward = 2 * cost.forward(lengths, None, rows)  # forward, and a gradient of states alone
        bench.keep(
            f"attribution of all heads, {prompts}",
            {
                "ours_seconds": times["first"],
                "hooks_seconds_scaled": share * times["hooks"],
                **about,
                "correlation_with_exact_effects": r,
            },
            limit(full, backward, (share * times["hooks"], times["first"]), bench.rate),
            over_exact_patching_by_full_forwards=ratio(found["hooks"], found["first"], 90.0, share),
        )


def gradients(bench: Bench) -> None:
    """Measure integrated gradients of every layer beside captum."""
    base, model, cost = bench.base, bench.base.model, bench.cost
    engine = SuffixEngine(model)
    length = min(TOKENS, bench.size.length)
    ids = token_rows(bench, 1, length)
    batch = Batch(ids, where=torch.ones_like(ids, dtype=torch.bool))
    answer = int(clean_states(model, batch).logits.argmax())
    kept: list[Tensor] = []
    job = {
        "model": bench.folder,
        "ids": ids,
        "baseline": torch.zeros_like(ids),
        "answer": answer,
        "nodes": NODES,
        "heads": base.num_heads,
    }

    def integrate() -> Tensor:
        states = clean_states(model, batch)
        baseline = Baseline(clean_states(model, Batch(torch.zeros_like(ids))).z)
        return integrated_gradients(
            engine,
            batch,
            lambda logits: logits.log_softmax(-1)[:, answer],
            None,
            baseline,
            NODES,
            states,
        ).values

    what = f"integrated gradients of all layers, {NODES} nodes"

    def use(peer: Peer) -> None:
        found = in_turn(
            {"ours": lambda: turn(lambda: kept.append(integrate())), "captum": peer.turn}, bench.size.slow
        )
        theirs = peer.result.double()
        difference = float((kept[-1] - theirs).norm() / theirs.norm())
        assert difference < 1e-2, difference
        one, depth = [length], base.depth
        run = cost.forward(one, depth / 2, 1)
        ours = depth * (NODES * 2 + 1) * run + 2 * cost.forward(one)
        # Two runs to read the layer, and one for each node with a gradient of what lies above the layer.
        captum = depth * ((2 + NODES) * cost.forward(one) + NODES * cost.forward(one, depth / 2))
        seconds = (median(found["captum"]), median(found["ours"]))
        figures = {
            "ours_seconds": seconds[1],
            "captum_seconds": seconds[0],
            "tokens": length,
            "layers": depth,
        }
        bench.keep(
            what,
            figures | {"relative_difference": difference, "beside": peer.version},
            limit(captum, ours, seconds, bench.rate),
            over_captum=ratio(found["captum"], found["ours"], 3.0),
        )

    bench.beside(what, "captum", job, use)


def _score(logits: Tensor, answer: Tensor | None = None) -> Tensor:
    """Return the log-probability of the most probable token, or of a given one, `(..., rows)`."""
    log_p = logits.log_softmax(-1)
    if answer is None:
        return log_p.amax(-1)
    return log_p.gather(-1, answer.expand(log_p.shape[:-1])[..., None])[..., 0]


def _patched(engine: SuffixEngine, batch: Batch) -> Tensor:
    """Silence every head, one at a time; return logits `(layers, heads, rows, vocabulary)`."""
    states = clean_states(engine.model, batch)
    chosen = [(layer, head) for layer, z in states.z.items() for head in range(z.shape[2])]
    found = [patch_heads(engine, batch, states, part, ZERO) for part in parts(chosen, batch)]
    return torch.cat(found).unflatten(0, (len(states.z), -1))


@torch.no_grad()
def _by_hooks(model: Any, ids: Tensor, layers: list[int], heads: int) -> Tensor:
    """Do the same with a hook and a full forward for every head of some layers."""
    found = []
    for layer in layers:
        for head in range(heads):

            def silence(_module: Any, args: tuple[Any, ...], head: int = head) -> tuple[Any, ...]:
                z = args[0].unflatten(-1, (heads, -1)).clone()
                z[..., head, :] = 0
                return (z.flatten(-2), *args[1:])

            handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
            found.append(model(input_ids=ids, use_cache=False).logits[:, -1].clone())
            handle.remove()
    return torch.stack(found).unflatten(0, (len(layers), heads))
