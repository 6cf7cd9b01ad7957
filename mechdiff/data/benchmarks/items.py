"""The item that every benchmark is turned into, and what multiple choice gives away by itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from mechdiff.config import SEED
from mechdiff.errors import PromptError
from mechdiff.functional.stats import generator

Kind = Literal["mc", "exact", "math", "freeform", "toxicity", "bias"]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark.
        kind: How it is answered and scored: ``mc`` one of the options; ``exact`` a number; ``math`` an
            expression; ``freeform`` text that is judged; ``toxicity`` a text to be continued; ``bias`` one of
            three options of which one is "unknown".
        question: What is asked, or the text to be continued.
        context: What precedes the question: a passage, or the turns before it.
        options: Possible answers.
        gold: Index of the right option, or the right answer as text; None where there is none.
        lang: Language code.
        category: Subject, as the data set names it.
        meta: What only one benchmark has; see its loader.
    """

    id: str
    kind: Kind
    question: str
    context: str = ""
    options: tuple[str, ...] = ()
    gold: int | str | None = None
    lang: str = "en"
    category: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Baseline(NamedTuple):
    """What guessing always the same letter scores."""

    letter: str
    accuracy: float
    counts: dict[str, int]


def permute_options(item: Item, seed: int = SEED) -> Item:
    """Put the options in an order drawn from the seed and the item's id.

    ``meta["order"]`` holds the old indices; an "unknown" or "biased" index in ``meta`` moves along.
    """
    order = torch.randperm(len(item.options), generator=generator(seed, "options", item.id)).tolist()
    meta = {**item.meta, "order": tuple(order)}
    for key in ("unknown", "biased"):
        if meta.get(key) is not None:
            meta[key] = order.index(meta[key])
    gold = order.index(item.gold) if isinstance(item.gold, int) else item.gold
    return replace(item, options=tuple(item.options[i] for i in order), gold=gold, meta=meta)


def majority_letter(items: Iterable[Item]) -> Baseline:
    """Count the gold letters and say what the most frequent one alone would score; ties go to the first.

    Raises:
        PromptError: If no item has a gold option.
    """
    golds = [item.gold for item in items if isinstance(item.gold, int)]
    if not golds:
        raise PromptError(
            "no item has a gold option; a majority letter needs multiple choice (key: pair.benchmarks)"
        )
    found = Counter(golds)
    counts = {LETTERS[i]: found[i] for i in range(len(LETTERS))}
    letter = max(counts, key=lambda name: counts[name])
    return Baseline(letter, counts[letter] / len(golds), counts)


def fold(item: Item, folds: int = 5) -> int:
    """Assign an item to a fold by a hash of its question.

    The same question, however spaced or cased, always lands in the same fold.
    """
    text = " ".join(item.question.casefold().split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % folds


def sample(items: Sequence[Item], limit: int | None, seed: int = SEED, name: str = "") -> list[Item]:
    """Draw `limit` items without replacement and keep their order; all of them if there are no more.

    Raises:
        PromptError: If `limit` is not positive.
    """
    if limit is None:
        return list(items)
    if limit < 1:
        raise PromptError(
            f"the number of items of benchmark {name!r} is {limit}; allowed: 1 or more (key: limit)"
        )
    chosen = torch.randperm(len(items), generator=generator(seed, "benchmark", name))[:limit]
    return [items[i] for i in sorted(chosen.tolist())]
