"""English texts of many lengths out of the files of this repository, in an order that says nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from benchmarks.shapes import ROOT
from mechdiff.data.prompts import Prompt

SEED = 5
SOURCES = ("prompts_fit", "prompts_freeform_en", "prompts_maths", "prompts_neutral")
FIT = 80
"""Prompts of the fit file, which are all of one length."""


def corpus(count: int, repeat: int = 1) -> list[Prompt]:
    """Return texts as prompts to fit on, every other a target, each with a topic and a template of its own.

    Args:
        count: How many different texts.
        repeat: How often each of them comes.
    """
    found = sorted(set(_texts()))
    random.Random(SEED).shuffle(found)
    assert len(found) >= count, f"there are {len(found)} texts"
    return [
        Prompt(f"t{i}-{n}", text, "en", ("neutral", "target")[i % 2], "fit", f"t{i}", f"s{i}")
        for n in range(repeat)
        for i, text in enumerate(found[:count])
    ]


def _texts() -> Iterator[str]:
    for name in SOURCES:
        rows = [row for row in _rows(name) if row["lang"] == "en"]
        yield from (row["text"] for row in rows[:: max(len(rows) // FIT, 1)])
    yield from (row["chosen"].strip() for row in _rows("benchmarks/hh_rlhf"))
    yield from (
        row["prompt"]["text"] + row["continuation"]["text"] for row in _rows("benchmarks/toxicity_prompts")
    )
    yield from (f"{row['problem']}\n\n{row['solution']}" for row in _rows("benchmarks/math"))
    yield from (f"{row['question']}\n\n{row['answer']}" for row in _rows("benchmarks/word_problems"))
    for row in _rows("benchmarks/bbq"):
        options = " ".join(f"({n}) {row[f'ans{n}']}" for n in range(3))
        yield f"{row['context']} {row['question']} {options}"


def _rows(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
