"""What a model knows: multiple choice, problems with one right answer, and bias between groups.

1. Multiple choice is scored without a chat template, as lm-evaluation-harness does by default, in the formats
   ``letter`` and ``cloze``; each context is run once.
2. Problems are answered greedily after the chat template. Beside it the right answer is scored against wrong
   ones near it, which sees changes long before an exact match does.
3. Bias is read from the options that are chosen where the context does or does not tell.

The controls need no second run: guessing (`chance`), always giving the most frequent gold letter
(`majority_letter`), and each answer held against the next problem (`shuffled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mechdiff.callbacks.observations import Observation
from mechdiff.callbacks.refusal import NOT_SHARED, TOO_LONG
from mechdiff.data.benchmarks.bias import bias_share, outcome
from mechdiff.data.benchmarks.items import Item, majority_letter
from mechdiff.data.benchmarks.maths import MathJudge
from mechdiff.data.benchmarks.scoring import Scored, score_math, score_number
from mechdiff.functional.scoring import (
    DELIMITER,
    FORMATS,
    LETTERS,
    Choice,
    choose,
    distractors,
    question_prompt,
)
from mechdiff.functional.stats import generator
from mechdiff.pairs.voice import Spoken, Voice

UNPARSED = "unparsed"
"""Why an answer counts as wrong that may be right; how many there are is a quantity of its own."""
NO_STEREOTYPE = "no_stereotyped_answer"
"""Why an item counts for no bias score: its groups do not tell which answer is the biased one."""
RATES = ("mc_acc", "mc_acc_norm", "mc_acc_bytes")


def chosen(voice: Voice, items: Sequence[Item], name: str) -> Iterator[Observation]:
    """Observe accuracy and log P(correct) in multiple choice, and bias where the items are about it.

    Args:
        voice: The model.
        items: Items with options and the index of the right one.
        name: Name of the benchmark.
    """
    letter = LETTERS.index(majority_letter(items).letter)
    written = {
        form: [question_prompt(i.question, i.options, form, i.lang, i.context) for i in items]
        for form in FORMATS
    }
    spoken = {
        form: voice.score_all([(text, [DELIMITER + option for option in scored]) for text, scored in asked])
        for form, asked in written.items()
    }
    for number, item in enumerate(items):
        assert isinstance(item.gold, int)
        for form in FORMATS:
            scored = written[form][number][1]
            for params, choice, reason in _choices(spoken[form][number], scored, item.gold, name, form):
                yield from _multiple_choice(item.id, choice, reason, params)
                if item.kind == "bias":
                    yield from _bias(item, choice, reason, params)
        cell = {"benchmark": name}
        chance = 1 / len(item.options)
        yield Observation("mc_acc", item.id, chance, "fraction", cell, control="chance")
        hit = float(item.gold == letter)
        yield Observation("mc_acc", item.id, hit, "fraction", cell, rate=True, control="majority_letter")


def solved(voice: Voice, items: Sequence[Item], name: str, tokens: int, seed: int) -> Iterator[Observation]:
    """Observe exact match in problems, and the right answer among wrong ones.

    Args:
        voice: The model.
        items: Problems with the right answer as text.
        name: Name of the benchmark.
        tokens: Longest solution.
        seed: Seed of the wrong answers.
    """
    golds = [str(item.gold) for item in items]
    both = voice.answer_messages([item.question for item in items], tokens)
    with MathJudge() as judge:
        for masking, answers in enumerate(both):
            cell = {"benchmark": name, "masking": bool(masking)}
            for number, (item, answer) in enumerate(zip(items, answers, strict=True)):
                other = items[(number + 1) % len(items)]
                for control, question in (("none", item), ("shuffled", other)):
                    if control == "shuffled" and other.gold == item.gold:
                        continue
                    match = _match(item.id, question, answer, judge, cell, control)
                    yield match
                    if control == "none" and answer is not None:
                        unread = float(match.reason == UNPARSED)
                        yield Observation("unparsed", item.id, unread, "fraction", cell, rate=True)
    for item in items:
        assert isinstance(item.gold, str)
        draws = generator(seed, "distractors", item.id)
        wrong = distractors(item.gold, golds, draws)
        if not wrong:
            continue
        place = int(torch.randint(len(wrong) + 1, (), generator=draws))
        options = [*wrong[:place], item.gold, *wrong[place:]]
        spoken = voice.score_answers(item.question, options)
        for params, choice, reason in _choices(spoken, options, place, name, "cloze"):
            yield from _multiple_choice(item.id, choice, reason, params)
        yield Observation(
            "mc_acc", item.id, 1 / len(options), "fraction", {"benchmark": name}, control="chance"
        )


def _choices(
    spoken: Spoken, options: Sequence[str], gold: int, name: str, form: str
) -> Iterator[tuple[dict[str, Any], Choice | None, str | None]]:
    """Yield the cell, what was chosen, and why nothing was, without masking and with it."""
    for masking, scores in enumerate((spoken.free, spoken.masked)):
        params = {"benchmark": name, "format": form, "masking": bool(masking)}
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            yield params, None, TOO_LONG if spoken.new_mass is None else NOT_SHARED
        else:
            yield params, choose(torch.tensor(known, dtype=torch.float64), options, gold), None


def _multiple_choice(
    item: str, choice: Choice | None, reason: str | None, params: Mapping[str, Any]
) -> Iterator[Observation]:
    hits = (choice.acc, choice.acc_norm, choice.acc_bytes) if choice else (None, None, None)
    for quantity, hit in zip(RATES, hits, strict=True):
        value = None if hit is None else float(hit)
        yield Observation(quantity, item, value, "fraction", params, rate=True, reason=reason)
    for among, value in (
        ("all", choice.logprob if choice else None),
        ("options", choice.logprob_among if choice else None),
    ):
        yield Observation("logprob_correct", item, value, "nats", {**params, "among": among}, reason=reason)


def _bias(
    item: Item, choice: Choice | None, reason: str | None, params: Mapping[str, Any]
) -> Iterator[Observation]:
    """Observe what an answer adds to s_AMB or s_DIS."""
    seen = None
    if choice is not None:
        seen = outcome(item, choice.chosen_norm if params["format"] == "cloze" else choice.chosen)
    share = None if seen is None else bias_share(seen)
    if seen is not None and share is None:
        reason = NO_STEREOTYPE
    value, weight = (None, 1.0) if share is None else share
    cell = {**params, "condition": str(item.meta["condition"])}
    yield Observation("bias_score", item.id, value, "score", cell, weight=weight, reason=reason)


def _match(
    name: str, item: Item, answer: str | None, judge: MathJudge, cell: Mapping[str, Any], control: str
) -> Observation:
    about: dict[str, Any] = {"unit": "fraction", "params": cell, "rate": True, "control": control}
    if answer is None:
        return Observation("exact_match", name, None, reason=TOO_LONG, **about)
    scored: Scored = score_number(item, answer) if item.kind == "exact" else score_math(item, answer, judge)
    if scored.correct is None:  # an answer that cannot be read is not right, and is said to be unread
        return Observation("exact_match", name, 0.0, reason=UNPARSED, **about)
    return Observation("exact_match", name, float(scored.correct), **about)
