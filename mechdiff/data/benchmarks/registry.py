"""Benchmarks by name: where they lie, how their rows are read, and which columns they must have."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mechdiff.config import SEED
from mechdiff.data.benchmarks.bias import bias_question
from mechdiff.data.benchmarks.items import Item, Kind, sample
from mechdiff.data.benchmarks.loaders import (
    BadRow,
    dialogue,
    math_problem,
    multiple_choice,
    role_prompt,
    toxicity_prompt,
    word_problem,
)
from mechdiff.data.benchmarks.sources import HubSource, Row, read_rows
from mechdiff.errors import PromptError


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read.

    Attributes:
        kind: Kind of its items.
        read: Turns a row into an item.
        columns: Columns a row must have; of names joined by ``|`` one is enough.
        hub: Where the data set lies; None if the project's own sample is all there is.
        sample: The sample that ships with the repository.
        lang: Language code.
    """

    kind: Kind
    read: Callable[[Row, str], Item]
    columns: tuple[str, ...]
    hub: HubSource | None
    sample: str
    lang: str = "en"


@dataclass(frozen=True)
class BenchmarkData:
    """The items of a benchmark and where they came from.

    Attributes:
        name: Name in the registry.
        items: In the order of the source.
        source: File, folder or hub id.
        revision: Commit on the hub; None for a local source.
        dropped: What was wrong with each row that was left out.
        digest: Hash of ids, questions, options and golds.
    """

    name: str
    items: tuple[Item, ...]
    source: str
    revision: str | None
    dropped: tuple[str, ...]
    digest: str


_MC = ("question", "A", "B", "C", "D", "answer|formatted_answer")
_MATH_CONFIGS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_FOLDER = "data/benchmarks"

BENCHMARKS: Mapping[str, Benchmark] = {
    "kk_mc": Benchmark(
        "mc",
        multiple_choice,
        _MC,
        HubSource("kz-transformers/kk-socio-cultural-bench-mc", split="train"),
        f"{_FOLDER}/mc_kk.jsonl",
        "kk",
    ),
    "en_mc": Benchmark("mc", multiple_choice, _MC, None, f"{_FOLDER}/mc_en.jsonl"),
    "gsm8k": Benchmark(
        "exact",
        word_problem,
        ("question", "answer"),
        HubSource("openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", configs=("main",)),
        f"{_FOLDER}/word_problems.jsonl",
    ),
    "math": Benchmark(
        "math",
        math_problem,
        ("problem", "solution"),
        HubSource(
            "EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", configs=_MATH_CONFIGS
        ),
        f"{_FOLDER}/math.jsonl",
    ),
    "math_500": Benchmark(
        "math",
        math_problem,
        ("problem", "solution", "answer"),
        HubSource("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
        f"{_FOLDER}/math.jsonl",
    ),
    "hh_rlhf": Benchmark(
        "freeform",
        dialogue,
        ("chosen", "rejected"),
        HubSource("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", folder="harmless-base"),
        f"{_FOLDER}/hh_rlhf.jsonl",
    ),
    "toxicity_prompts": Benchmark(
        "toxicity",
        toxicity_prompt,
        ("prompt",),
        HubSource("allenai/real-toxicity-prompts", split="train"),
        f"{_FOLDER}/toxicity_prompts.jsonl",
    ),
    "bbq": Benchmark(
        "bias",
        bias_question,
        (
            "context",
            "question",
            "ans0",
            "ans1",
            "ans2",
            "context_condition",
            "question_polarity",
            "category",
            "label|answer_label",
        ),
        HubSource("Elfsong/BBQ", split=None),
        f"{_FOLDER}/bbq.jsonl",
    ),
    "roles": Benchmark("freeform", role_prompt, ("act", "prompt"), None, f"{_FOLDER}/roles.jsonl"),
}
"""Every benchmark. Where neither this nor the source names a commit, the newest is used.

The provenance of a run has the commit that was used, and a digest of the items.
"""


def load_benchmark(
    name: str,
    source: str | None = None,
    *,
    limit: int | None = None,
    seed: int = SEED,
    drop_bad: bool = False,
) -> BenchmarkData:
    """Read a benchmark.

    Args:
        name: A name in `BENCHMARKS`, as in the pair file's ``benchmarks``.
        source: File, folder or hub id (``owner/name`` or ``owner/name@revision``); None for the registry's.
        limit: Number of items, drawn by the seed and kept in order; None for all.
        seed: Seed of that draw.
        drop_bad: Leave out rows that cannot be read, and list them, instead of stopping at the first.

    Raises:
        PromptError: If the name is unknown, the source cannot be read, a column is missing, or a row is bad.
    """
    key = f"pair.benchmarks.{name}"
    if name not in BENCHMARKS:
        raise PromptError(
            f"unknown benchmark {name!r}; allowed: {', '.join(BENCHMARKS)} (key: pair.benchmarks)"
        )
    spec = BENCHMARKS[name]
    hub = spec.hub or HubSource("", split="train")
    source = source or hub.id
    if not source:
        raise PromptError(
            f"benchmark {name!r} has no data set on the hub; give a file such as {spec.sample} (key: {key})"
        )
    found = read_rows(source, _matching(source, hub), spec.sample, key)
    _check_columns(found.rows, spec.columns, source, key)
    items, bad = _items(name, spec, found.rows)
    if bad and not drop_bad:
        more = f"; {len(bad)} of {len(found.rows)} rows are bad" if len(bad) > 1 else ""
        raise PromptError(f"{bad[0]}{more} (key: {key}; drop_bad leaves such rows out and lists them)")
    if not items:
        raise PromptError(f"{source} holds no item of benchmark {name!r} (key: {key})")
    chosen = sample(items, limit, seed, name)
    return BenchmarkData(name, tuple(chosen), source, found.revision, tuple(bad), _digest(chosen))


def load_benchmarks(
    sources: Mapping[str, str],
    *,
    limits: Mapping[str, int] | None = None,
    seed: int = SEED,
    drop_bad: bool = False,
) -> dict[str, BenchmarkData]:
    """Read all benchmarks that a pair file names.

    Raises:
        PromptError: As `load_benchmark`.
    """
    limits = limits or {}
    return {
        name: load_benchmark(name, source, limit=limits.get(name), seed=seed, drop_bad=drop_bad)
        for name, source in sources.items()
    }


def _matching(source: str, hub: HubSource) -> HubSource:
    """Return the layout of the data set that is named, if the registry knows it under any name."""
    known = {spec.hub.id: spec.hub for spec in BENCHMARKS.values() if spec.hub}
    return known.get(source.partition("@")[0], hub)


def _items(name: str, spec: Benchmark, rows: Sequence[tuple[str, Row]]) -> tuple[list[Item], list[str]]:
    items: dict[int, Item] = {}
    bad = []
    for number, (place, row) in enumerate(rows):
        try:
            item = spec.read(row, spec.lang)
        except BadRow as error:
            bad.append(f"{place}: {error}")
        else:
            items[number] = replace(item, id=item.id or f"{name}-{number:05d}")
    counts = Counter(item.id for item in items.values())
    # Ids of a data set need not be unique: one web page gives several toxicity prompts.
    return [replace(i, id=f"{i.id}#{n}") if counts[i.id] > 1 else i for n, i in items.items()], bad


def _check_columns(rows: Sequence[tuple[str, Row]], columns: Sequence[str], source: str, key: str) -> None:
    for place, row in rows:
        missing = [c for c in columns if not any(name in row for name in c.split("|"))]
        if missing:
            found = ", ".join(sorted(name for name in row if not name.startswith("_"))) or "none"
            where = "" if place == rows[0][0] else f" in {place}"
            raise PromptError(
                f"{source} lacks column {missing[0].replace('|', ' or ')}{where}; found: {found} (key: {key})"
            )


def _digest(items: Sequence[Item]) -> str:
    parts = ("\x1f".join([i.id, i.context, i.question, *i.options, str(i.gold)]) for i in items)
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]
