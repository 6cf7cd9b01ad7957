"""The cases of a calibration: what is planted, how strongly, on how many prompts, and which draw of it.

1. A case is a kind, a strength, a number of prompts and a draw; all that is drawn depends on these names and
   the seed alone, so that any process can run any case. The place of a planted change depends on the kind and
   the draw, not on the strength: a curve over strengths compares the same places.
2. Every planted difference lies on top of rounding: all other weights are rounded to bfloat16, so that every
   block differs and only the planted ones for a reason.
3. `NULLS` change nothing that matters. Of those, `swapped` and `halves` are two readings of a model whose
   labels mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mechdiff.errors import ConfigError

TUNING_SEED = 1
"""Seed of all cases on which thresholds and defaults were looked at; a table is made with another."""
PROMPTS = 16
"""Targets of dev and of eval in a case, and as many neutral prompts."""
CLEAR_NATS = 0.02
"""Divergence of tuned from base, nats per prompt, from which a difference is clearly measurable. It was set
beforehand; in tuning, policies and noise in one block were placed exactly from an eighth of it on."""
GRAFTED = 8
"""Heads with the largest own change that are grafted."""

STRENGTHS: dict[str, tuple[float, ...]] = {
    "policy_1": (0.03, 0.1, 0.3, 1.0),
    "policy_2": (0.1, 0.3, 1.0),
    "policy_4": (0.1, 0.3, 1.0),
    "block": (0.01, 0.03, 0.1, 0.3),
    "spread": (0.01, 0.03, 0.1, 0.3),
    "flip": (0.1, 0.3, 1.0),
    "rotate": (0.1, 0.3, 1.0),
    "query": (0.1, 0.3, 1.0),
    "key": (0.1, 0.3, 1.0),
    "relay": (0.1, 0.3, 1.0),
}
"""Kinds that change something, and how strongly: in the unit of the function that plants them."""
NULLS = {"copy": 0.4, "bf16": 16.0, "vocabulary": 2.0, "swapped": 2.0, "halves": 2.0}
"""Kinds without a difference, and how often they are repeated, relative to the others."""
MORE_PROMPTS = {"policy_1": (0.1, (8, 32)), "flip": (0.3, (8, 32))}
"""Kinds that are also run on other numbers of prompts, at one strength."""
QUESTIONS = {
    "policy": ("rq1", "rq2", "rq3"),
    "block": ("rq1", "rq2"),
    "spread": ("rq1",),
    "flip": ("rq1", "rq4"),
    "rotate": ("rq1", "rq4"),
    "query": ("rq1", "rq4"),
    "key": ("rq1", "rq4"),
    "relay": ("rq1",),
    "copy": ("rq1", "rq2", "rq3", "rq4"),
    "bf16": ("rq1", "rq2", "rq3", "rq4"),
    "vocabulary": ("rq1", "rq2", "rq3", "rq4"),
    "swapped": ("rq4",),
    "halves": ("rq4",),
}
"""What is asked of a kind."""
KINDS = (*STRENGTHS, *NULLS)


@dataclass(frozen=True, order=True)
class Case:
    """One planted difference, or none.

    Attributes:
        kind: One of `KINDS`.
        strength: How strong; 0 for a null.
        prompts: Targets of dev and of eval.
        draw: Number of the repeat.
    """

    kind: str
    strength: float
    prompts: int
    draw: int

    @property
    def family(self) -> str:
        """Name of the kind without its rank."""
        return self.kind.partition("_")[0]

    @property
    def rank(self) -> int:
        """Directions of a policy, 1 for all others."""
        return int(self.kind.partition("_")[2] or 1)

    @property
    def questions(self) -> tuple[str, ...]:
        """What is asked of it."""
        return QUESTIONS[self.family]

    @property
    def size(self) -> int:
        """How long it takes, relative to others, roughly."""
        return self.prompts * len(self.questions)

    @property
    def null(self) -> bool:
        """Whether there is nothing to find."""
        return self.kind in NULLS

    def __str__(self) -> str:
        return f"{self.kind} {self.strength:g}, {self.prompts} prompts, draw {self.draw}"

    def entry(self) -> dict[str, Any]:
        """Return it as a line of the raw results holds it."""
        return asdict(self)


def grid(repeats: int, kinds: Sequence[str] = KINDS, prompts: int = PROMPTS) -> list[Case]:
    """Return the cases of a calibration.

    Draws are the outermost loop, so that a calibration that was cut off is a smaller one; of each draw what
    takes longest comes first, so that processes that share the cases end together.

    Args:
        repeats: Draws of each kind, strength and number of prompts.
        kinds: Which kinds, of `KINDS`.
        prompts: The usual number of prompts.

    Raises:
        ConfigError: If repeats or prompts is not positive, or a kind is unknown.
    """
    for name, value in {"repeats": repeats, "prompts": prompts}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: --{name})")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"kinds has {unknown[0]!r}; allowed: {', '.join(KINDS)} (key: --kinds)")
    found = [(draw, case) for kind in kinds for draw, case in _of_kind(kind, repeats, prompts)]
    order = {kind: place for place, kind in enumerate(kinds)}
    return [c for _, c in sorted(found, key=lambda f: (f[0], -f[1].size, order[f[1].kind], f[1]))]


def _of_kind(kind: str, repeats: int, prompts: int) -> Iterator[tuple[int, Case]]:
    if kind in NULLS:
        count = max(1, round(repeats * NULLS[kind]))
        for draw in range(count):
            yield draw * repeats // count, Case(kind, 0.0, prompts, draw)
        return
    for draw in range(repeats):
        for strength in STRENGTHS[kind]:
            yield draw, Case(kind, strength, prompts, draw)
        if kind in MORE_PROMPTS:
            strength, counts = MORE_PROMPTS[kind]
            for count in counts:
                yield draw, Case(kind, strength, count, draw)
