"""Read one line of JSON Lines, and refuse letters that change tokens without being seen."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from mechdiff.errors import PromptError, cut

_CYRILLIC = "аеорсухіһјѕԛԝАВЕКМНОРСТУХІЅЈԌҺ"
_LATIN = "aeopcyxihjsqwABEKMHOPCTYXISJGh"
_TWINS = frozenset(_CYRILLIC + _LATIN)
"""Letters of one alphabet that look like one of the other."""
_WORD = re.compile(r"[^\W\d_]+")
_SPACES = "\t\n\r\x85"
_JOINERS = "\u200c\u200d"
"""Meant between letters of Persian or of India, and in emoji; between Latin or Cyrillic letters never."""


def parse(line: str) -> Any:
    """Read a line of JSON.

    Raises:
        PromptError: If it is none, or an object has a key twice.
    """
    try:
        return json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise PromptError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise PromptError("not JSON that can be read: it is nested too deeply") from error
    except PromptError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise PromptError(f"not JSON that can be read: {cut(str(error))}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"key {cut(twice)} occurs twice")
    return found


def trap(text: str) -> str | None:
    """Say which letters of a text are not what they look like, None if all are.

    Such texts read as others do and are cut into other tokens: half of a surrogate pair; characters that
    cannot be seen; a letter and its accent apart, where one character stands for both; and a word of Latin
    letters with a Cyrillic twin among them, or the other way round. A word that truly joins the alphabets,
    such as ``PDFті``, has a letter of each that the other lacks, and passes.

    Args:
        text: What is to be read by a model.
    """
    strange = {char for char in set(text) if unicodedata.category(char) in ("Cs", "Cc", "Cf")}
    for at, char in enumerate(text) if strange.difference(_SPACES) else ():
        if unicodedata.category(char) == "Cs":
            return f"has half of a surrogate pair, {_name(char)}, at character {at + 1}"
        if _unseen(text, at):
            return f"has {_name(char)}, which cannot be seen, at character {at + 1}"
    if not unicodedata.is_normalized("NFC", text):
        composed = unicodedata.normalize("NFC", text)
        at = next((i for i, (a, b) in enumerate(zip(text, composed, strict=False)) if a != b), len(composed))
        return f"is not in Unicode form NFC from character {at + 1} on ({_name(text[at])})"
    for word in _WORD.findall(text):
        if twins := _twins(word):
            return f"has {', '.join(map(_name, twins))} in {cut(word)}"
    return None


def _unseen(text: str, at: int) -> bool:
    char = text[at]
    if char in _JOINERS:
        beside = text[at - 1 : at] + text[at + 1 : at + 2]
        return len(beside) < 2 or any(_alphabet(c) or c.isspace() for c in beside)
    category = unicodedata.category(char)
    return (category == "Cc" and char not in _SPACES) or (category == "Cf" and not _visible(char))


def _visible(char: str) -> bool:
    """Whether a character of format is drawn: signs that stand over numbers, and music."""
    return char in "\u06dd\u070f\u08e2\U000110bd\U000110cd" or "\u0600" <= char <= "\u0605"


def _twins(word: str) -> list[str]:
    """Return the letters that make a word of two alphabets seem to be of one; none if it is not."""
    if word.isascii():
        return []
    latin, cyrillic = ([c for c in word if _alphabet(c) == name] for name in ("LATIN", "CYRILLIC"))
    false = [found for found in (latin, cyrillic) if set(found) <= _TWINS]
    if not (latin and cyrillic and false):
        return []
    fewest = min(false, key=len)
    return list(dict.fromkeys(fewest))


def _alphabet(char: str) -> str:
    return next((a for a in ("LATIN", "CYRILLIC") if unicodedata.name(char, "").startswith(a)), "")


def _name(char: str) -> str:
    return f"U+{ord(char):04X} {unicodedata.name(char, '')}".strip()
