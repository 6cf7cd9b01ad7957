"""Score multiple choice from the log-probabilities of its options.

1. Format ``letter``: the options are listed under letters and the letters are scored; format ``cloze``: the
   question alone is shown and the options themselves are scored.
2. An option is chosen by its log-probability (``acc``), by that over its length in characters (``acc_norm``)
   or over its length in bytes of UTF-8 (``acc_bytes``). The space before an option is not counted. Of equal
   options the first is chosen.
3. log P(correct) is the gold option's log-probability, as it is or renormalised over the options.

Source: EleutherAI/lm-evaluation-harness 0.4.13, output type ``multiple_choice``.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["letter", "cloze"]
FORMATS: tuple[Format, ...] = ("letter", "cloze")
LETTERS = "ABCDEFGH"
DELIMITER = " "
"""Between a context and an option."""

_WORDS = {"en": ("Question", "Answer"), "kk": ("Сұрақ", "Жауап"), "ru": ("Вопрос", "Ответ")}


class Choice(NamedTuple):
    """What was chosen, and what that says of the gold option.

    Attributes:
        acc: Whether the gold option has the highest log-probability.
        acc_norm: The same per character.
        acc_bytes: The same per byte of UTF-8.
        logprob: Log-probability of the gold option, nats.
        logprob_among: The same renormalised over the options, nats.
        chosen: Index of the option with the highest log-probability.
        chosen_norm: The same per character.
    """

    acc: bool
    acc_norm: bool
    acc_bytes: bool
    logprob: float
    logprob_among: float
    chosen: int
    chosen_norm: int


def choose(logprobs: Tensor, options: Sequence[str], gold: int) -> Choice:
    """Choose among options by their log-probabilities.

    Args:
        logprobs: Log-probability of each option as a continuation, nats, `(options,)`.
        options: The options as written, without the space before them.
        gold: Index of the correct one.

    >>> choice = choose(torch.tensor([-4.0, -4.5]), ["six", "seventeen"], gold=1)
    >>> choice.acc, choice.acc_norm, choice.logprob
    (False, True, -4.5)
    """
    assert len(options) == len(logprobs), f"{len(logprobs)} log-probabilities of {len(options)} options"
    assert 0 <= gold < len(options), f"gold is {gold} of {len(options)} options"
    logprobs = logprobs.detach().to("cpu", torch.float64)
    characters = torch.tensor([len(option) for option in options], dtype=torch.float64)
    sizes = torch.tensor([len(option.encode()) for option in options], dtype=torch.float64)
    plain, norm, byte = (_first_best(logprobs / by) for by in (torch.ones(()), characters, sizes))
    among = logprobs.log_softmax(0)[gold].item()
    return Choice(plain == gold, norm == gold, byte == gold, logprobs[gold].item(), among, plain, norm)


def question_prompt(
    question: str, options: Sequence[str], form: Format, lang: str = "en", context: str = ""
) -> tuple[str, list[str]]:
    r"""Write the text before the answer, and the answers to score after `DELIMITER`.

    Args:
        question: The question.
        options: The options.
        form: `letter` lists the options and scores letters, `cloze` scores the options.
        lang: Language of the words around the question; English for one that is not known.
        context: What the question is about, if anything.

    >>> question_prompt("Two and two?", ["three", "four"], "letter")
    ('Question: Two and two?\nA) three\nB) four\nAnswer:', ['A', 'B'])
    >>> question_prompt("Екі мен екі?", ["үш", "төрт"], "cloze", "kk")
    ('Сұрақ: Екі мен екі?\nЖауап:', ['үш', 'төрт'])
    """
    ask, answer = _WORDS.get(lang, _WORDS["en"])
    lines = [context] * bool(context) + [f"{ask}: {question}"]
    if form == "letter":
        lines += [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    scored = list(LETTERS[: len(options)]) if form == "letter" else list(options)
    return "\n".join([*lines, f"{answer}:"]), scored


def distractors(gold: str, others: Sequence[str], generator: torch.Generator, count: int = 3) -> list[str]:
    """Draw wrong answers to a problem: numbers near the right one, or else right answers of other problems.

    Args:
        gold: The right answer.
        others: Right answers of other problems.
        generator: Source of the draw.
        count: How many; fewer if there are not enough different ones.

    >>> near = distractors("12", ["7", "30"], torch.Generator().manual_seed(0))
    >>> len(set(near)), "12" in near
    (3, False)
    """
    number = _number(gold)
    if number is None:
        pool = [other for other in dict.fromkeys(others) if other != gold]
    else:
        near = [*(number + step for step in (1, -1, 2, -2, 10, -10)), 2 * number, number / 2]
        usable = [
            x for x in near if (x >= 0 or number < 0) and (x.denominator == 1 or number.denominator > 1)
        ]
        pool = [_written(x) for x in dict.fromkeys(usable) if x != number]
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _written(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):g}"


def _first_best(scores: Tensor) -> int:
    return int((scores == scores.max()).nonzero()[0])
