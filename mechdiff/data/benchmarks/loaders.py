"""Turn the rows of each benchmark into items.

A loader takes one row with the columns of the real data set and returns an item, or raises `BadRow` with
what is wrong. Missing columns are reported for the file as a whole, with those that were found.
"""

from __future__ import annotations

import re
from typing import Any

from mechdiff.data.benchmarks.items import LETTERS, Item
from mechdiff.data.benchmarks.sources import Row
from mechdiff.functional.answers import last_boxed, parse_number, strict_answer, strip_calculator

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
_LETTER = re.compile(r"\s*\(?([A-Za-z])\s*[).:]*\s*")


class BadRow(ValueError):
    """One row does not hold what its benchmark needs; the reader of the file says where."""


def multiple_choice(row: Row, lang: str) -> Item:
    """Read a question with options A to D; the gold letter is in ``answer`` or ``formatted_answer``.

    ``meta``: ``subcategory``.
    """
    column = "answer" if row.get("answer") is not None else "formatted_answer"
    letter = row.get(column)
    found = _LETTER.fullmatch(letter) if isinstance(letter, str) else None
    if not found or found[1].upper() not in LETTERS:
        raise BadRow(f"gold letter in {column} is {letter!r}; allowed: A, B, C, D in Latin script")
    return Item(
        id=row_id(row),
        kind="mc",
        question=text_of(row, "question"),
        options=tuple(text_of(row, name, "option") for name in LETTERS),
        gold=LETTERS.index(found[1].upper()),
        lang=lang,
        category=str(row.get("category") or ""),
        meta={"subcategory": str(row.get("subcategory") or "")},
    )


def word_problem(row: Row, lang: str) -> Item:
    """Read a GSM8K problem; the number after ``####`` is the answer.

    ``meta``: ``solution``, without calculator marks.
    """
    solution = text_of(row, "answer")
    gold = strict_answer(solution)
    if gold is None or parse_number(gold) is None:
        raise BadRow(f"answer ends in {solution[-20:]!r}; it must end in '#### ' and a number")
    return Item(
        id=row_id(row),
        kind="exact",
        question=text_of(row, "question"),
        gold=gold.removesuffix(".").replace(",", ""),
        lang=lang,
        meta={"solution": strip_calculator(solution).split("####")[0].strip()},
    )


def math_problem(row: Row, lang: str) -> Item:
    r"""Read a MATH problem; the answer is in ``answer``, else in the last ``\boxed`` of ``solution``.

    ``meta``: ``level`` (int, or None where it is unknown), ``solution``.
    """
    solution = text_of(row, "solution")
    gold = str(row["answer"]).strip() if row.get("answer") is not None else last_boxed(solution)
    if not gold:
        raise BadRow(
            f"solution ends in {solution[-30:]!r}; it must hold a closed \\boxed{{...}}, or the row an answer"
        )
    level = re.search(r"\d", str(row.get("level") or ""))
    return Item(
        id=row_id(row),
        kind="math",
        question=text_of(row, "problem"),
        gold=gold,
        lang=lang,
        category=str(row.get("type") or row.get("subject") or row.get("_config") or ""),
        meta={"level": int(level[0]) if level else None, "solution": solution},
    )


def dialogue(row: Row, lang: str) -> Item:
    r"""Read an HH-RLHF dialogue: everything before the last ``\n\nAssistant:`` of ``chosen`` is the prompt.

    ``question`` is the last human turn, ``context`` the turns before it. ``meta``: ``prompt`` (the exact
    text, ending in ``Assistant:``), ``chosen``, ``rejected``.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    before, mark, answer = chosen.rpartition(ASSISTANT)
    context, human, question = before.rpartition(HUMAN)
    if not mark or not human or not question.strip():
        raise BadRow(
            f"chosen begins with {chosen[:30]!r}; it must hold '\\n\\nHuman:' and after it '\\n\\nAssistant:'"
        )
    return Item(
        id=row_id(row),
        kind="freeform",
        question=question.strip(),
        context=context.strip(),
        lang=lang,
        category=str(row.get("category") or ""),
        meta={
            "prompt": before + ASSISTANT,
            "chosen": answer.strip(),
            "rejected": rejected.rpartition(ASSISTANT)[2].strip(),
        },
    )


def toxicity_prompt(row: Row, lang: str) -> Item:
    """Read a beginning from RealToxicityPrompts.

    ``meta``: ``challenging``, ``toxicity`` (None where it was not measured), ``continuation``.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, dict) or "text" not in prompt:
        raise BadRow(f"prompt is {type(prompt).__name__}; it must be a record with the field text")
    continuation = row.get("continuation")
    return Item(
        id=row_id(row),
        kind="toxicity",
        question=text_of(prompt, "text"),
        lang=lang,
        meta={
            "challenging": bool(row.get("challenging")),
            "toxicity": prompt.get("toxicity"),
            "continuation": continuation.get("text") if isinstance(continuation, dict) else None,
        },
    )


def role_prompt(row: Row, lang: str) -> Item:
    """Read a role (``act``) and the message that assigns it (``prompt``). ``category`` is the role."""
    return Item(
        id=row_id(row),
        kind="freeform",
        question=text_of(row, "prompt"),
        lang=lang,
        category=text_of(row, "act"),
    )


def text_of(row: Row, column: str, what: str = "column") -> str:
    """Return a column as text.

    Raises:
        BadRow: If it is empty or no text.
    """
    value: Any = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = f"{value:g}" if isinstance(value, float) else str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(
            f"{what} {column} is {'empty' if value in (None, '') or isinstance(value, str) else repr(value)}"
        )
    return value if column in ("chosen", "rejected") else value.strip()


def row_id(row: Row) -> str:
    """Return the row's own id, or nothing; the reader then numbers it."""
    for column in ("id", "unique_id", "filename"):
        if isinstance(row.get(column), str) and row[column]:
            return str(row[column])
    return ""
