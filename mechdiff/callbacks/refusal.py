"""How a model answers users: refusals, style, fluency, and probability outside the shared vocabulary.

1. An answer is decoded greedily and read for a refusal and for markers of style.
2. The graded score is the log-odds of refusing: the summed probability of whole refusing openings against
   that of as many complying ones of the same language. First words mislead: both kinds begin alike.
3. Fluency is bits per byte of neutral messages, so that tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mechdiff.callbacks.graded import Openings
from mechdiff.callbacks.observations import Observation
from mechdiff.data.prompts import Prompt
from mechdiff.functional.metrics import logodds, refusal_score
from mechdiff.functional.style import style_markers
from mechdiff.pairs.voice import Answers, Voice

TOO_LONG, NOT_SHARED = "too_long", "not_shared"


def answered(
    voice: Voice,
    ids: Sequence[str],
    messages: Sequence[str],
    params: Sequence[Mapping[str, Any]],
    tokens: int,
) -> Iterator[Observation]:
    """Let a model answer messages and observe refusals and style.

    Args:
        voice: The model.
        ids: Id of each message.
        messages: What users say.
        params: Cell of each message.
        tokens: Longest answer.
    """
    for masking, answers in enumerate(voice.answer_messages(messages, tokens)):
        yield from judged(ids, answers, [{**p, "masking": bool(masking)} for p in params])


def judged(
    ids: Sequence[str], answers: Answers, params: Sequence[Mapping[str, Any]]
) -> Iterator[Observation]:
    """Observe refusals and style in answers; None is one that there was no room for."""
    for name, answer, cell in zip(ids, answers, params, strict=True):
        if answer is None:
            yield Observation("refusal_rate", name, None, "fraction", cell, rate=True, reason=TOO_LONG)
            continue
        yield Observation("refusal_rate", name, refusal_score(answer), "fraction", cell, rate=True)
        style = style_markers(answer)
        for marker, count in style.counts.items():
            yield Observation(
                "style_markers",
                name,
                count,
                "per 100 words",
                {**cell, "marker": marker},
                weight=style.words / 100,
            )


def opened(
    voice: Voice, prompts: Sequence[Prompt], openings: Mapping[str, Openings]
) -> Iterator[Observation]:
    """Observe the log-odds of refusing and the next-token mass on tokens that are not shared.

    Args:
        voice: The model.
        prompts: Messages in languages that have openings.
        openings: Refusing and complying openings by language.
    """
    for prompt in prompts:
        refusing, complying = openings[prompt.lang]
        spoken = voice.score_answers(prompt.text, [*refusing, *complying])
        cell = {"lang": prompt.lang, "label": prompt.label}
        for masking, scores in enumerate((spoken.free, spoken.masked)):
            known = [s for s in scores if s is not None]
            odds = (
                float(logodds(*torch.tensor(known).double().split([len(refusing), len(complying)])))
                if len(known) == len(scores)
                else None
            )
            yield Observation(
                "refusal_logodds",
                prompt.id,
                odds,
                "nats",
                {**cell, "masking": bool(masking)},
                reason=None if odds is not None else TOO_LONG if spoken.new_mass is None else NOT_SHARED,
                positions="last",
            )
        yield Observation(
            "new_token_mass",
            prompt.id,
            spoken.new_mass,
            "fraction",
            cell,
            reason=TOO_LONG if spoken.new_mass is None else None,
            positions="last",
        )


def read(voice: Voice, prompts: Sequence[Prompt]) -> Iterator[Observation]:
    """Observe bits per byte of messages.

    Args:
        voice: The model.
        prompts: Neutral messages.
    """
    for prompt in prompts:
        spoken = voice.score_message(prompt.text)
        for masking, (nats,) in enumerate((spoken.free, spoken.masked)):
            yield Observation(
                "bits_per_byte",
                prompt.id,
                None if nats is None else -nats / math.log(2),
                "bits per byte",
                {"lang": prompt.lang, "masking": bool(masking)},
                weight=len(prompt.text.encode()),
                reason=None if nats is not None else TOO_LONG if spoken.new_mass is None else NOT_SHARED,
            )
