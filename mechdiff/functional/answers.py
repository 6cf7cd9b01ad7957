r"""Read the answer out of a generated solution, and compare numbers.

1. Strict: the number after the first ``####``. Flexible: the last run of digits, signs, points and commas.
2. Two numbers agree by the harness rule if the same text is left after commas, dollar signs, everything up to
   ``####`` and a final point are dropped and case is folded; so ``18.0`` differs from ``18``.
3. They agree by value if they are the same decimal; so ``18.0`` agrees with ``$18``.
4. The answer of a MATH solution is the content of its last ``\boxed{...}``, braces balanced.

Source: rules 1 and 2 are the filters and the metric of the task ``gsm8k`` (version 3.0) of
lm-evaluation-harness 0.4.13; GSM8K is Cobbe et al., arXiv 2110.14168.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

Rule = Literal["harness", "value"]

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = [re.compile(p) for p in (r",", r"\$", r"(?s).*#### ", r"\.$")]
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)\s+(?P<bare>[^\s${}]+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def strict_answer(text: str) -> str | None:
    r"""Return the number after the first ``####``, or None if there is none.

    >>> strict_answer("6 * 7 = 42\n#### 42"), strict_answer("The answer is 42.")
    ('42', None)
    """
    found = _STRICT.search(text)
    return found[1] if found else None


def flexible_answer(text: str) -> str | None:
    """Return the last thing that looks like a number, as it stands, or None if there is none.

    It need not be a number: a trailing ``...`` is returned too. Ask `parse_number`.

    >>> flexible_answer("She pays $1,050 for 3 chairs."), flexible_answer("None."), flexible_answer("x...")
    ('3', None, '...')
    """
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else None


def normalise_answer(text: str) -> str:
    r"""Drop what the harness ignores when it compares two answers.

    >>> normalise_answer("5 * 250 = 1250\n#### $1,250.")
    '1250'
    """
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def parse_number(text: str) -> Decimal | None:
    """Read a decimal number, with thousands commas, a dollar or per cent sign and a final point allowed.

    >>> parse_number("$1,250.00"), parse_number("-3."), parse_number("1,2"), parse_number("...")
    (Decimal('1250.00'), Decimal('-3'), None, None)
    """
    plain = text.strip().removesuffix(".").removesuffix("%").replace("$", "")
    if "," in plain:
        if not _GROUPED.fullmatch(plain):
            return None
        plain = plain.replace(",", "")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def same_answer(gold: str, answer: str, rule: Rule = "harness") -> bool:
    """Say whether two answers agree, by the harness rule or by value.

    >>> same_answer("1,250", "$1250."), same_answer("18", "18.0"), same_answer("18", "18.0", "value")
    (True, False, True)
    """
    if rule == "harness":
        return normalise_answer(gold) == normalise_answer(answer)
    first, second = parse_number(gold), parse_number(answer)
    return first is not None and first == second


def strip_calculator(solution: str) -> str:
    """Remove the calculator marks of GSM8K.

    >>> strip_calculator("He sold 48/2 = <<48/2=24>>24 clips.")
    'He sold 48/2 = 24 clips.'
    """
    return _CALCULATOR.sub("", solution)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed`` or ``\fbox`` that is closed, or None.

    >>> last_boxed(r"So $x = \boxed{\frac{1}{2}}$."), last_boxed(r"$\boxed 7$"), last_boxed(r"\boxed{3")
    ('\\frac{1}{2}', '7', None)
    """
    for found in reversed(list(_BOX.finditer(text))):
        if found["bare"]:
            return found["bare"]
        inside = _braced(text, found.end())
        if inside is not None:
            return inside.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    """Return what stands between the brace at `start` and its partner."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + 1 : place]
    return None
