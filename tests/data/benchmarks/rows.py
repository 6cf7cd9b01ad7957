"""Rows in the columns of the real data sets, and the shipped samples."""

import json
from pathlib import Path

from mechdiff.data.benchmarks.registry import BENCHMARKS, BenchmarkData, load_benchmark

ROOT = Path(__file__).parents[3]
SHIPPED = {name: ROOT / spec.sample for name, spec in BENCHMARKS.items() if name != "math_500"}
MC = {"question": "Q?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B", "category": "x"}
BBQ = {
    "example_id": 1,
    "question_index": "1",
    "question_polarity": "neg",
    "context_condition": "ambig",
    "category": "Age",
    "answer_info": {"ans0": ["Ann", "old"], "ans1": ["Bo", "nonOld"], "ans2": ["unknown", "unknown"]},
    "additional_metadata": {"stereotyped_groups": ["old"]},
    "context": "Ann and Bo met.",
    "question": "Who forgot?",
    "ans0": "Ann",
    "ans1": "Bo",
    "ans2": "Not known",
    "label": 2,
}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def shipped(name: str) -> BenchmarkData:
    return load_benchmark(name, str(SHIPPED[name]))
