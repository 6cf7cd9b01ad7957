"""A pool of per-prompt records of a real pair: the population from which samples of prompts are drawn.

1. Sentence patterns are taken from the pair's own prompts and crossed with the topics of their language and
   class, so that one pattern, a family, has many prompts.
2. Each prompt is read at its last position by base, by tuned, and by base with tuned's weights in some of its
   upper blocks (a graft): what is left of the gap to tuned. Two thirds of them restore nearly all of it, so
   that what is left rests on a few prompts; the upper half restores a part.
3. Two further numbers are of other kinds: a signed one (log-probability of base's favourite token, tuned −
   base) and one of 0 and 1 (whether the favourite token begins a refusal).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mechdiff.callbacks.graded import read_openings
from mechdiff.callbacks.grafts import shared_rows
from mechdiff.callbacks.handle_evaluation import two_engines, two_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_ends
from mechdiff.config import SEED
from mechdiff.data.prompts import Label, Prompt, load_prompts
from mechdiff.errors import ConfigError
from mechdiff.files import whole
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import graft
from mechdiff.pairs.loading import LoadedPair

COLUMNS = ("gap", "left", "half", "shift", "base", "tuned")
TOPICS = 14
"""Prompts of a family; the 159 families of the embedded English prompts make 2,226."""


@dataclass(frozen=True)
class Pool:
    """Numbers by prompt.

    Attributes:
        family: Sentence pattern of each prompt, by number, ``(prompts,)``.
        columns: By name of ``COLUMNS``, ``(prompts,)`` each: KL(tuned ‖ base), and KL(tuned ‖ grafted base)
            with two thirds and with half of the blocks grafted, in nats, the signed number in nats, and
            whether base and tuned begin to refuse, 0 or 1.
    """

    family: Tensor
    columns: Mapping[str, Tensor]

    def write(self, path: str | Path) -> Path:
        """Write the pool as a table, four significant digits."""
        table = zip(self.family.tolist(), *(self.columns[name].tolist() for name in COLUMNS), strict=True)
        with whole(Path(path)) as part, part.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("family", *COLUMNS))
            rows.writerows((family, *(f"{value:.4g}" for value in values)) for family, *values in table)
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Pool:
        """Read a table written by ``write``.

        Raises:
            ConfigError: If the file is missing or not such a table.
        """
        try:
            with Path(path).open(encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            if tuple(header) != ("family", *COLUMNS):
                raise ValueError(f"columns {', '.join(header)}; expected family, {', '.join(COLUMNS)}")
            table = torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64)
            return cls(table[:, 0].long(), dict(zip(COLUMNS, table[:, 1:].unbind(1), strict=True)))
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"cannot read {path} as a pool of prompts: {error}") from error


def crossed(prompts: Sequence[Prompt], lang: str, topics: int = TOPICS, seed: int = SEED) -> list[Prompt]:
    """Cross sentence patterns with topics of the same class.

    Args:
        prompts: Where the patterns and topics come from; a pattern is a text that names its topic once.
        lang: Language of the prompts that are used.
        topics: Number of topics of each pattern, drawn for each anew.
        seed: Seed of the draws.

    Returns:
        Prompts whose ``template`` is the pattern; the texts differ.
    """
    patterns: dict[str, dict[str, None]] = defaultdict(dict)
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for p in prompts:
        if p.lang == lang and p.text.count(p.topic) == 1:
            patterns[p.label][p.text.replace(p.topic, "{}")] = None
            names[p.label][p.topic] = None
    found = (
        _family(label, lang, patterns[label], list(names[label]), topics, seed) for label in sorted(patterns)
    )
    return list({prompt.text: prompt for family in found for prompt in family}.values())


@torch.no_grad()
def measure(pair: LoadedPair, prompts: Sequence[Prompt], openings: Sequence[str]) -> Pool:
    """Read prompts with base, tuned, and base grafted with tuned's upper blocks, of two depths.

    Args:
        pair: The models.
        prompts: Both must be able to read them.
        openings: Refusing openings; their first tokens begin a refusal.
    """
    base, tuned = two_sides(pair, prompts, two_engines(pair))
    before, after = read_ends(base, []).log_p, read_ends(tuned, []).log_p
    depth = base.loaded.depth
    grafted = []
    for lowest in (depth // 3, depth // 2):
        with ExitStack() as stack:
            for layer in range(lowest, depth):
                stack.enter_context(
                    graft(base.loaded.model, tuned.loaded.model, f"block.{layer}", shared_rows(pair))
                )
            grafted.append(read_ends(base, []).log_p)
    favourite = before.argmax(-1, keepdim=True)
    first = _first_tokens(base, openings)
    columns = {
        "gap": kl_divergence(after, before),
        "left": kl_divergence(after, grafted[0]),
        "half": kl_divergence(after, grafted[1]),
        "shift": (after - before).gather(1, favourite)[:, 0],
        "base": torch.isin(favourite[:, 0], first),
        "tuned": torch.isin(after.argmax(-1), first),
    }
    families = {name: number for number, name in enumerate(dict.fromkeys(p.template for p in prompts))}
    family = torch.tensor([families[p.template] for p in prompts])
    return Pool(family, {name: column.double() for name, column in columns.items()})


def pool_of(pair: LoadedPair, lang: str = "en", topics: int = TOPICS, seed: int = SEED) -> Pool:
    """Make the pool of a pair from its own prompts and openings.

    Raises:
        ConfigError: If the pair has no openings.
    """
    if pair.spec.openings is None:
        raise ConfigError(
            f"pair {pair.spec.name} has no openings, so a refusal cannot be told (key: openings)"
        )
    prompts = crossed(load_prompts(pair.spec.prompts), lang, topics, seed)
    return measure(pair, prompts, read_openings(Path(pair.spec.openings))[lang][0])


def _family(
    label: str, lang: str, patterns: Iterable[str], names: Sequence[str], topics: int, seed: int
) -> Iterator[Prompt]:
    for pattern in patterns:
        order = torch.randperm(len(names), generator=generator(seed, "topics", pattern)).tolist()
        for number in islice(order, topics):
            text = pattern.replace("{}", names[number])
            yield Prompt(text, text, lang, cast(Label, label), "eval", pattern, names[number])


def _first_tokens(side: Side, openings: Sequence[str]) -> Tensor:
    """Return the places among the shared tokens of the first tokens of texts."""
    ids = [side.loaded.tokenizer(text, add_special_tokens=False).input_ids[0] for text in openings]
    return torch.isin(side.shared.cpu(), torch.tensor(ids)).nonzero()[:, 0]
