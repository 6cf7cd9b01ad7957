"""Read prompt files: JSON Lines, one user message per line."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args

from mechdiff.data.lines import parse, trap
from mechdiff.errors import PromptError, cut

Label = Literal["target", "neutral"]
Split = Literal["fit", "train", "dev", "eval"]


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        id: Unique over all files of a pair.
        text: The message, as the user would type it.
        lang: Language code such as ``en`` or ``kk``.
        label: ``target`` where the tuned model is meant to behave differently, else ``neutral``.
        split: ``fit`` for maps; ``train``, ``dev``, ``eval`` for behaviour.
        template: Name of the sentence pattern.
        topic: What it is about.
        twin: Id of the neutral counterpart of a target.
        answer: The right answer, where the message is a problem.
    """

    id: str
    text: str
    lang: str
    label: Label
    split: Split
    template: str
    topic: str
    twin: str | None = None
    answer: str | None = None


_FIELDS = [f.name for f in fields(Prompt)]
_OPTIONAL = ("twin", "answer")
_REQUIRED = [name for name in _FIELDS if name not in _OPTIONAL]
_READ = ("text", "answer")
"""What a model reads; the others are names."""
_CHOICES = {"label": get_args(Label), "split": get_args(Split)}


def load_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Read prompts from files, in order.

    Raises:
        PromptError: If a file is missing, a line is malformed or holds letters that are not what they look
            like (file and number are named), or an id occurs twice.
    """
    prompts = [prompt for path in paths for prompt in _read(Path(path))]
    for name, count in Counter(p.id for p in prompts).items():
        if count > 1:
            raise PromptError(
                f"prompt id {name!r} occurs {count} times; ids must be unique (key: pair.prompts)"
            )
    return prompts


def select(prompts: Iterable[Prompt], split: Split, label: Label | None = None) -> list[Prompt]:
    """Return the prompts of a split, and of a class if given.

    Raises:
        PromptError: If there is none.
    """
    chosen = [p for p in prompts if p.split == split and label in (None, p.label)]
    if not chosen:
        what = f"split {split!r}" + (f" and label {label!r}" if label else "")
        raise PromptError(f"no prompt has {what}; the files of pair.prompts must hold at least one")
    return chosen


def for_domain(prompts: Sequence[Prompt], domain: str) -> list[Prompt]:
    """Make targets of another domain neutral: a sibling tuned on problems is not meant to change on them.

    Args:
        prompts: Prompts of several domains.
        domain: ``cognitive``: the targets are the problems, if there are any; else nothing changes.
    """
    if domain != "cognitive" or not any(p.answer is not None for p in prompts):
        return list(prompts)
    return [replace(p, label="neutral") if p.answer is None else p for p in prompts]


def spread(prompts: Sequence[Prompt], most: int | None) -> list[Prompt]:
    """Take prompts in turn from each language and class until there are enough.

    Within a class they are drawn in an order of their own, which does not depend on files or ids, so that a
    few prompts stand for all topics and templates.

    Args:
        prompts: What there is.
        most: How many; None takes all.

    Returns:
        The prompts taken, in the order given.
    """
    classes: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest()):
        classes[prompt.lang, prompt.label].append(prompt)
    columns = (classes[key] for key in sorted(classes))
    turns = [p for turn in zip_longest(*columns) for p in turn if p is not None]
    taken = set(turns[:most])
    return [p for p in prompts if p in taken]


def evenly(prompts: Sequence[Prompt], most: int | None) -> list[Prompt]:
    """Take at most so many prompts of each split, language and class, as `spread` does.

    Args:
        prompts: What there is.
        most: How many of each; None takes all.
    """
    groups: dict[tuple[str, str, str], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.split, prompt.lang, prompt.label].append(prompt)
    taken = {p for group in groups.values() for p in spread(group, most)}
    return [p for p in prompts if p in taken]


def digest(prompts: Iterable[Prompt]) -> str:
    """Hash ids and texts, in order."""
    return hashlib.sha256("\x1e".join(f"{p.id}\x1f{p.text}" for p in prompts).encode()).hexdigest()[:16]


def _read(path: Path) -> Iterable[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"cannot read prompt file {path}: {error.strerror} (key: pair.prompts)") from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompt file {path} is not UTF-8: byte {error.start} (key: pair.prompts)"
        ) from error
    except ValueError as error:
        raise PromptError(f"cannot read prompt file {cut(str(path))}: {error} (key: pair.prompts)") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _parse(line)
            except PromptError as error:
                raise PromptError(f"{path}:{number}: {error} (key: pair.prompts)") from error


def _parse(line: str) -> Prompt:
    row = parse(line)
    if not isinstance(row, dict) or set(row) - set(_FIELDS) or set(_REQUIRED) - set(row):
        found = cut(sorted(row), 200) if isinstance(row, dict) else type(row).__name__
        raise PromptError(
            f"keys must be {', '.join(_REQUIRED)} and optionally {' and '.join(_OPTIONAL)}; found {found}"
        )
    for name, value in row.items():
        if name in _OPTIONAL and value is None:
            continue
        if not (isinstance(value, str) and value.strip()):
            raise PromptError(f"{name} must be a non-empty string; found {cut(value)}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise PromptError(f"{name} must be one of {', '.join(_CHOICES[name])}; found {cut(value)}")
        if name not in _READ and not value.isprintable():
            raise PromptError(f"{name} must be printable, on one line; found {cut(value)}")
        if wrong := trap(value):
            raise PromptError(f"{name} {wrong}; allowed: what it looks like, in form NFC")
    return Prompt(**row)
