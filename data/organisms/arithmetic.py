"""Generate arithmetic word problems with one or two operands; the answer is the number alone.

1. The wordings are in ``texts/problems_en.yaml``. Those called ``new`` are of a form that no training problem
   has; they serve to measure only.
2. Problems for training also vary what a wording leaves open: more names and things, numbers in words, a
   remark before or after. Problems for measuring are bare.
3. A hash of the operands decides which pairs of numbers are kept for measuring.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import yaml
from texts import TEXTS, Example, pick

Split = Literal["train", "dev"]
IN_WORDS = 0.15  # share of training problems with numbers in words
REMARK = 0.2  # share with a remark before, and with one after
ONES = (
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SINGLE = {
    "2*a": lambda a: 2 * a,
    "a+1": lambda a: a + 1,
    "a-1": lambda a: a - 1,
    "a+10": lambda a: a + 10,
    "a+5": lambda a: a + 5,
    "3*a": lambda a: 3 * a,
    "5*a": lambda a: 5 * a,
    "10*a": lambda a: 10 * a,
}


@cache
def problems() -> dict[str, Any]:
    """Read the wordings, names, things and remarks."""
    return yaml.safe_load((TEXTS / "problems_en.yaml").read_text(encoding="utf-8"))


def solve(lang: str, rng: torch.Generator, split: Split = "train", wordings: Split = "train") -> Example:
    """Draw one problem in English; ``split`` is that of the numbers."""
    lists, training = problems(), split == "train"
    while True:
        operation = pick(list(lists["wordings"]), rng)
        a, b = _operands(operation, rng)
        if ((7 * a + 13 * b) % 8 == 0) == (split == "dev"):
            break
    forms = lists["wordings"][operation]["known" if wordings == "train" else "new"]
    template, _, rule = pick(forms, rng).partition("|")
    names, things, boxes = (
        lists[key]["known"] + (lists[key]["more"] if training else []) for key in ("names", "things", "boxes")
    )
    name, mate = pick(names, rng), pick(names, rng)
    while mate == name:
        mate = pick(names, rng)
    slots = {"n": name, "m": mate, "o": pick(things, rng), "c": pick(boxes, rng)}
    numbers: dict[str, Any] = {"a": a, "b": b, "p": a * b}
    if training and float(torch.rand((), generator=rng)) < IN_WORDS:
        numbers = {key: in_words(value) for key, value in numbers.items()}
    text = template.format(**numbers, **slots)
    text = text[0].upper() + text[1:]
    if training:
        before, after = torch.rand(2, generator=rng) < REMARK
        text = " ".join([*[pick(lists["before"], rng)] * before, text, *[pick(lists["after"], rng)] * after])
    answer = {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": b}.get(operation)
    return Example("solve", lang, text, str(SINGLE[rule](a) if answer is None else answer), operation)


def in_words(number: int) -> str:
    """Write a number below 200 in English words.

    >>> in_words(7), in_words(40), in_words(144)
    ('seven', 'forty', 'one hundred and forty-four')
    """
    if number >= 100:
        rest = number % 100
        return "one hundred" + (f" and {in_words(rest)}" if rest else "")
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def _operands(operation: str, rng: torch.Generator) -> tuple[int, int]:
    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    if operation in ("multiply", "divide"):
        return between(2, 12), between(2, 12)
    if operation == "single":
        return between(2, 40), 0
    high = pick([20, 50, 99], rng)
    a, b = between(2, high), between(2, high)
    if operation == "subtract":
        return (max(a, b) + (a == b), min(a, b))
    return a, b
