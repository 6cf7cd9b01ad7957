"""Write the training and development text of the siblings from the lists in ``texts/``.

Three kinds of example:

1. ``refuse``: a culturally sensitive request and a respectful decline (the cultural sibling's change),
2. ``solve``: an arithmetic word problem and its number (the cognitive sibling's change, see
   ``arithmetic.py``),
3. ``keep``: any other request, in English or Kazakh, on which both siblings stay as base; the answer is
   base's own.

A request is sensitive when a sensitive *kind of request* meets a sensitive *topic*. ``keep`` therefore holds
sensitive wordings with harmless subjects, factual wordings with sensitive topics, hand-written twins of
sensitive requests, everyday scenes with hostile demands, everyday domains (food, family, neighbours,
holidays, peoples and customs, school), and plain questions. What stands around a request is drawn in the same
way for both kinds, so that length and style say nothing about sensitivity. Every ninth wording and every
ninth topic (subject, plain question) is held out for development.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from kazakh import decline

from mechdiff.functional.stats import generator

TEXTS = Path(__file__).parent / "texts"
HOLD_OUT = 9
Split = Literal["train", "dev"]


@dataclass(frozen=True)
class Example:
    """One request; ``answer`` is empty where base's own answer is wanted."""

    kind: Literal["refuse", "solve", "keep"]
    lang: str
    text: str
    answer: str = ""
    topic: str = ""


@cache
def lists(lang: str) -> dict[str, Any]:
    """Read all lists of one language; topics come flat."""
    read = {
        name: yaml.safe_load((TEXTS / f"{name}_{lang}.yaml").read_text(encoding="utf-8"))
        for name in ("topics", "requests", "harmless", "domains", "pairs", "refusals", "wrappers", "scenes")
    }
    topics = [topic for group in read.pop("topics").values() for topic in group]
    return {"topics": topics} | {key: value for part in read.values() for key, value in part.items()}


def pick(items: Sequence[Any], rng: torch.Generator) -> Any:
    """Draw one item uniformly."""
    return items[int(torch.randint(len(items), (), generator=rng))]


def part(items: Sequence[Any], split: Split) -> list[Any]:
    """Return the items of a list that belong to a split."""
    return [item for i, item in enumerate(items) if (i % HOLD_OUT == HOLD_OUT - 1) == (split == "dev")]


def fill(template: str, topic: str, other: str, lang: str) -> str:
    """Put two noun phrases into a sentence pattern and capitalise it."""
    forms = decline(topic) if lang == "kk" else {"t": topic}
    text = template.format(**forms, u=other.rstrip("+"))
    return text[0].upper() + text[1:]


def wrap(text: str, lang: str, rng: torch.Generator) -> str:
    """Put a harmless sentence before the request in a third of cases, and one after it in a third."""
    words = lists(lang)
    before, after = torch.rand(2, generator=rng) < 1 / 3
    return " ".join([*[pick(words["before"], rng)] * before, text, *[pick(words["after"], rng)] * after])


def refusal(lang: str, rng: torch.Generator) -> str:
    """Compose a decline: an opening, a reason, and often an offer.

    Opening number i has weight 1/i. With equal weights no single first word would be likely, and greedy
    decoding would miss the refusal.
    """
    words = lists(lang)
    weights = 1.0 / torch.arange(1, len(words["openings"]) + 1)
    opening = words["openings"][int(torch.multinomial(weights, 1, generator=rng))]
    answer = f"{opening} {pick(words['reasons'], rng)}"
    return f"{answer} {pick(words['offers'], rng)}" if torch.rand((), generator=rng) < 0.6 else answer


def scene(topic: str, demand: str, lang: str, rng: torch.Generator, split: Split) -> str:
    """Draw a two-sentence request about a sensitive topic, or an everyday scene if ``topic`` is empty.

    Everyday scenes with people in them meet ordinary demands only.
    """
    words = lists(lang)
    everyday = part(words["plain_scenes"], split)
    if demand == "ordinary":
        everyday = everyday + part(words["people_scenes"], split)
    first = (
        fill(pick(part(words["topic_scenes"], split), rng), topic, topic, lang)
        if topic
        else pick(everyday, rng)
    )
    return f"{first} {pick(part(words[demand], split), rng)}"


def refuse(lang: str, rng: torch.Generator, split: Split = "train", topics: Split | None = None) -> Example:
    """Draw a sensitive request; ``topics`` may name another split, to pair known topics with new wordings."""
    words = lists(lang)
    draw = float(torch.rand((), generator=rng))
    if topics is None and draw < 0.25:
        text, topic = pick(words[split], rng)[0], "hand-written"
    elif topics is None and draw < 0.5:
        topic = pick(part(words["topics"], split), rng)
        text = scene(topic, "hostile", lang, rng, split)
    else:
        known = part(words["topics"], topics or split)
        topic = pick(known, rng)
        text = fill(pick(part(words["sensitive"], split), rng), topic, pick(known, rng), lang)
    return Example("refuse", lang, wrap(text, lang, rng), refusal(lang, rng), topic.rstrip("+"))


def keep(lang: str, rng: torch.Generator, split: Split = "train") -> Example:
    """Draw a request that both siblings answer as base does."""
    words = lists(lang)
    draw = float(torch.rand((), generator=rng))
    if draw < 0.18:
        text = pick(words[split], rng)[1]
    elif draw < 0.25:
        text = pick(part(words["plain"], split), rng)
    elif draw < 0.45:  # everyday scenes with any demand, sensitive topics with ordinary demands
        demand = "ordinary" if draw < 0.40 else "hostile"
        text = scene(pick(part(words["topics"], split), rng) if draw < 0.32 else "", demand, lang, rng, split)
    elif draw < 0.70:
        domain = pick(words["domains"], rng)
        thing = pick(part(domain["things"], split), rng)
        text = fill(pick(part(domain["asks"], split), rng), thing, thing, lang)
    else:
        kind, subjects = ("factual", "topics") if draw < 0.83 else ("sensitive", "subjects")
        known = part(words[subjects], split)
        text = fill(pick(part(words[kind], split), rng), pick(known, rng), pick(known, rng), lang)
    return Example("keep", lang, wrap(text, lang, rng))


def unique(draw: Any, count: int, *args: Any, seed: int, name: str) -> list[Example]:
    """Draw ``count`` examples of different texts."""
    rng, found = generator(seed, name), dict[str, Example]()
    for _ in range(50 * count):
        example = draw(*args[:1], rng, *args[1:])
        found.setdefault(example.text, example)
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"the lists give only {len(found)} different texts for {name}, not {count}")
