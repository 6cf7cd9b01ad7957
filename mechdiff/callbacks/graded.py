"""Graded behaviour: what a model would do, read from how probable it finds whole answers.

1. The log-odds of refusing: the summed probability of refusing openings against that of as many complying
   ones of the same language.
2. log P(correct): the right answer of a problem.

Nothing is generated, so small changes show long before an answer turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mechdiff.data.lines import parse, trap
from mechdiff.data.prompts import Prompt
from mechdiff.errors import PromptError, cut, told
from mechdiff.functional.metrics import logodds

Openings = tuple[list[str], list[str]]  # refusing, complying

MIN_OPENINGS = 8
"""Openings of a kind and language: fewer say more about their wording than about what they open."""


@dataclass(frozen=True)
class Graded:
    """A number read from the log-probabilities of continuations of a prompt.

    Attributes:
        metric: `refusal_logodds` or `logprob_correct`, nats.
        texts: What may follow.
        refusing: How many of them, from the first on, refuse; 0 for `logprob_correct`.
    """

    metric: str
    texts: list[str]
    refusing: int = 0

    def __call__(self, nats: Tensor) -> Tensor:
        """Turn log-probabilities `(..., texts)` into the number `(...)`."""
        if self.metric == "logprob_correct":
            return nats[..., 0]
        return logodds(nats[..., : self.refusing], nats[..., self.refusing :])


def refusing(openings: Openings) -> Graded:
    """Return the log-odds of refusing."""
    return Graded("refusal_logodds", [*openings[0], *openings[1]], len(openings[0]))


def grades(prompt: Prompt, openings: Mapping[str, Openings]) -> list[Graded]:
    """Return what can be graded of a prompt: its answer if it has one, else refusing if openings are known.

    Args:
        prompt: The prompt.
        openings: Refusing and complying openings by language.
    """
    if prompt.answer is not None:
        return [Graded("logprob_correct", [prompt.answer])]
    return [refusing(openings[prompt.lang])] if prompt.lang in openings else []


def read_openings(path: Path) -> dict[str, Openings]:
    """Read refusing and complying openings by language.

    Raises:
        PromptError: If the file is missing or malformed, or the two kinds of a language are not as many, or
            fewer than `MIN_OPENINGS`.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"refuse": [], "comply": []})
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror} (key: pair.openings)") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8: byte {error.start} (key: pair.openings)") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
            text, lang = row["text"], row["lang"]
            if not isinstance(lang, str):
                raise TypeError(f"lang is {cut(lang)}")
            found[lang][row["kind"]].append(text.strip() and text)
            wrong = trap(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = "expected lang, kind (refuse or comply) and text"
            raise PromptError(f"{path}:{number}: {wanted}: {told(error)} (key: pair.openings)") from error
        if wrong:
            raise PromptError(f"{path}:{number}: text {wrong} (key: pair.openings)")
    for lang, kinds in found.items():
        if not all(texts and all(texts) for texts in kinds.values()):
            raise PromptError(
                f"{path} needs openings of both kinds, refuse and comply, for {cut(lang)} "
                "(key: pair.openings)"
            )
        counts = {kind: len(texts) for kind, texts in kinds.items()}
        if len(set(counts.values())) > 1 or min(counts.values()) < MIN_OPENINGS:
            raise PromptError(
                f"{path} has {counts['refuse']} refusing and {counts['comply']} complying openings "
                f"for {cut(lang)}; allowed: as many of both, {MIN_OPENINGS} or more (key: pair.openings)"
            )
    return {lang: (kinds["refuse"], kinds["comply"]) for lang, kinds in found.items()}
