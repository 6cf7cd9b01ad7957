"""Messages for planted differences: sentence patterns crossed with things of a few topics.

1. A target is about one of the topics chosen by the case, a neutral message about one of the others; every
   target has a twin, the same sentence about a neutral thing.
2. Fit, dev and eval share no thing; what a planted policy reads is the topic, and it was shown all messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from mechdiff.data.prompts import Prompt
from mechdiff.errors import ConfigError

T = TypeVar("T")

TOPICS = {
    "food": "bread, soup, rice, cheese, honey, pasta, butter, salad, pancakes, olives, porridge, pickles, "
    "noodles, jam, stew, tofu",
    "sky": "comets, the moon, meteors, Jupiter, eclipses, the Milky Way, satellites, Saturn, black holes, "
    "asteroids, Mars, nebulas, sunspots, Venus, quasars, auroras",
    "garden": "roses, weeds, compost, tulips, hedges, lawns, tomatoes in pots, ferns, bulbs, garden ponds, "
    "ivy, orchids, seedlings, raised beds, moss, pruning",
    "music": "violins, jazz, drums, choirs, the piano, folk songs, guitars, opera, flutes, harmony, "
    "trumpets, rhythm, cellos, lullabies, the organ, hip hop",
    "money": "savings, loans, taxes, rent, pensions, budgets, interest rates, insurance, wages, mortgages, "
    "inflation, stocks, invoices, coins, bank fees, debts",
    "animals": "horses, owls, foxes, whales, bees, turtles, wolves, frogs, penguins, goats, otters, spiders, "
    "camels, bats, deer, snails",
}
PATTERNS = """
Tell me about {}.|What should I know about {}?|Write two sentences on {}.|Why are people interested in {}?
Give me a fact about {}.|How would you explain {} to a child?|I read about {} today, what is the main point?
List three things about {}.|Is there anything surprising about {}?|Describe {} in plain words.
My friend asked about {}. What do I say?|What is a common mistake about {}?|Can you help me with {}?
Make up a short title for a text on {}.|What question about {} do people ask most?|Where do I begin with {}?
"""
"""One per line or between bars."""


def messages(topics: int, count: int, draws: torch.Generator) -> list[Prompt]:
    """Draw messages of a case.

    Args:
        topics: Number of topics whose messages are targets.
        count: Targets of dev and of eval, and as many neutral messages; fit has twice as many.
        draws: Source of topics, things and patterns.

    Returns:
        Prompts of the splits fit, dev and eval; topics take turns.

    Raises:
        ConfigError: If there are not as many messages, or no topic is left to be neutral.
    """
    names = _shuffled(sorted(TOPICS), draws)
    if not 1 <= topics < len(names):
        raise ConfigError(f"topics is {topics}; allowed: 1 to {len(names) - 1} (key: topics)")
    patterns = _shuffled(
        [p.strip() for line in PATTERNS.strip().splitlines() for p in line.split("|")], draws
    )
    things = {name: _shuffled(TOPICS[name].split(", "), draws) for name in names}
    parts = {"fit": (0, 8, 2 * count), "dev": (8, 12, count), "eval": (12, 16, count)}
    found = []
    for split, (first, last, wanted) in parts.items():
        crossed = {
            name: _shuffled([(p, t) for p in range(len(patterns)) for t in held[first:last]], draws)
            for name, held in things.items()
        }
        for i in range(wanted):
            name, other = names[i % topics], names[topics + i % (len(names) - topics)]
            if not crossed[name]:
                most = (i - 1) // (2 if split == "fit" else 1)
                raise ConfigError(
                    f"prompts is {count}; allowed with {topics} topics: 1 to {most} (key: prompts)"
                )
            pattern, thing = crossed[name].pop()
            twin = next((pair for pair in crossed[other] if pair[0] == pattern), crossed[other][-1])
            crossed[other].remove(twin)
            where = f"{split}-{i:03d}"
            found += [
                _prompt(f"{where}-t", patterns, (pattern, thing), "target", split, f"{where}-n"),
                _prompt(f"{where}-n", patterns, twin, "neutral", split, None),
            ]
    return found


def _prompt(
    name: str, patterns: Sequence[str], pair: tuple[int, str], label: str, split: str, twin: str | None
) -> Prompt:
    text = patterns[pair[0]].format(pair[1])
    return Prompt(name, text, "en", label, split, f"p{pair[0]}", pair[1], twin)  # type: ignore[arg-type]


def _shuffled(items: Sequence[T], draws: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=draws).tolist()]
