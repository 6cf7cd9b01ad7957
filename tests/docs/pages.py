"""The pages of the documentation, taken apart: fences, the files they show, and the commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.M | re.S)


class Fence(NamedTuple):
    """A fenced block: its language, the file that it shows if it does, and its text."""

    language: str
    title: str | None
    text: str


def fences(page: str) -> list[Fence]:
    """Return the fenced blocks of a page, by name."""
    found = _FENCE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [Fence(language, title or None, textwrap.dedent(text)) for _, language, title, text in found]


def write_files(page: str, folder: Path) -> list[Path]:
    """Write the files that a page shows into a folder."""
    written = []
    for fence in fences(page):
        if fence.title:
            path = folder / fence.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence.text, encoding="utf-8")
            written.append(path)
    return written


def commands() -> Iterator[list[str]]:
    """Yield every command of every page in words, each once."""
    seen = set()
    for page in PAGES:
        for fence in fences(page.name):
            if fence.language not in ("sh", "bash"):
                continue
            for line in fence.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("srun "), comments=True)
                if words and words[0] != "export" and line not in seen:
                    seen.add(line)
                    yield words
