"""Multiple choice with 4 options beside lm-evaluation-harness, on the same items."""

from __future__ import annotations

import json

import torch

from benchmarks.cpu.arithmetic import limit
from benchmarks.cpu.bench import Bench
from benchmarks.peer import Peer
from benchmarks.shapes import ROOT
from benchmarks.turns import Turn, in_turn, median, ratio, turn
from mechdiff.data.benchmarks.loaders import multiple_choice
from mechdiff.functional.scoring import DELIMITER, FORMATS, question_prompt
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.voice import Voice, encode_pair

FILE = ROOT / "data" / "benchmarks" / "mc_en.jsonl"
GOALS = {"cloze": 2.0}
"""The harness itself runs a context once where every option is one token, as letters are."""


def choices(bench: Bench) -> None:
    """Measure both formats."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][: bench.size.items]
    items = [multiple_choice(row, "en") for row in rows]
    for form in FORMATS:
        _beside(bench, form, [question_prompt(i.question, i.options, form, i.lang, i.context) for i in items])


def _beside(bench: Bench, form: str, written: list[tuple[str, list[str]]]) -> None:
    asked = [(text, [DELIMITER + option for option in options]) for text, options in written]
    pairs = [(text, option) for text, options in asked for option in options]
    tokens = [encode_pair(bench.base.tokenizer, *pair) for pair in pairs]
    kept: list[list[float | None]] = []
    what = f"multiple choice, 4 options, format {form}"
    job = {"model": bench.folder, "pairs": pairs, "context": bench.base.context_length}

    def ours() -> Turn:
        voice = speaker(bench.base)
        return turn(
            lambda: kept.append([score for spoken in voice.score_all(asked) for score in spoken.free])
        )

    def use(peer: Peer) -> None:
        found = in_turn({"ours": ours, "theirs": peer.turn}, bench.size.rounds)
        difference = float((torch.tensor(kept[-1], dtype=torch.float64) - peer.result).abs().max())
        assert difference < 1e-3, difference
        contexts, single = [len(a) for a, _ in tokens[::4]], all(len(b) == 1 for _, b in tokens)
        theirs = contexts if single else [len(a) + len(b) - 1 for a, b in tokens]
        rest = [len(b) - 1 for _, b in tokens]
        cost, seconds = bench.cost, (median(found["theirs"]), median(found["ours"]))
        ops = cost.forward(theirs), cost.forward(contexts, None, len(contexts)) + cost.forward(rest)
        figures = {
            "ours_seconds": seconds[1],
            "lm_eval_seconds": seconds[0],
            "items": len(written),
            "tokens_of_contexts": sum(contexts),
            "largest_difference_in_nats": difference,
            "beside": peer.version,
        }
        bench.keep(
            what,
            figures,
            limit(*ops, seconds, bench.rate),
            over_lm_eval=ratio(found["theirs"], found["ours"], GOALS.get(form)),
        )

    bench.beside(what, "lm_eval", job, use)


def speaker(loaded: LoadedModel) -> Voice:
    """Return a model that may say all that it can: a pair of itself."""
    ids = torch.arange(len(loaded.tokenizer))
    return Voice(loaded, ids, loaded.tokenizer, dict(enumerate(ids.tolist())))
