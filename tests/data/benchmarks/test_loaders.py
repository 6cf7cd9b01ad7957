"""Loaders on the real columns."""

import gzip
import json

import pyarrow as pa
import yaml
from pyarrow import parquet

from mechdiff.data.benchmarks.registry import BENCHMARKS, load_benchmark
from tests.data.benchmarks.rows import HH, MC, ROOT, SHIPPED, write


def test_the_gold_letter_may_be_in_either_column(tmp_path):
    other = {k: v for k, v in MC.items() if k != "answer"} | {"formatted_answer": " (c). "}
    first, second = (
        load_benchmark("kk_mc", write(tmp_path / f"{i}.jsonl", row)).items[0]
        for i, row in enumerate((MC, other))
    )
    assert (first.gold, second.gold) == (1, 2)
    assert (first.kind, first.lang, first.options, first.category) == ("mc", "kk", ("a", "b", "c", "d"), "x")


def test_word_problem_reads_commas_signs_and_calculator_marks(tmp_path):
    rows = [
        {"question": "Q", "answer": f"5*2=<<5*2=10>>10\n#### {n}"} for n in ("1,250", "-7", "3.50", "12.")
    ]
    items = load_benchmark("gsm8k", write(tmp_path / "a.jsonl", *rows)).items
    assert [i.gold for i in items] == ["1250", "-7", "3.50", "12"]
    assert items[0].meta["solution"] == "5*2=10"


def test_math_reads_both_layouts(tmp_path):
    old = {
        "problem": "P",
        "level": "Level 5",
        "type": "Algebra",
        "solution": r"$\boxed{1}$, so \boxed{\frac{1}{2}}.",
    }
    new = {
        "problem": "P",
        "level": 3,
        "subject": "Geometry",
        "solution": "s",
        "answer": r"\pi",
        "unique_id": "test/g/1.json",
    }
    unknown = old | {"level": "Level ?"}
    a, b, c = load_benchmark("math", write(tmp_path / "m.jsonl", old, new, unknown)).items
    assert (a.gold, a.meta["level"], a.category) == (r"\frac{1}{2}", 5, "Algebra")
    assert (b.gold, b.meta["level"], b.category, b.id) == (r"\pi", 3, "Geometry", "test/g/1.json")
    assert c.meta["level"] is None


def test_dialogue_prompt_ends_at_the_last_assistant(tmp_path):
    source = write(tmp_path / "h.jsonl", {"chosen": HH + " Good.", "rejected": HH + " Bad."})
    item = load_benchmark("hh_rlhf", source).items[0]
    assert item.meta["prompt"] == HH
    assert (item.question, item.context) == ("Why?", "Human: Hi\n\nAssistant: Hello")
    assert (item.meta["chosen"], item.meta["rejected"]) == ("Good.", "Bad.")


def test_toxicity_keeps_unmeasured_scores_apart_from_zero(tmp_path):
    rows = [
        {"filename": "same.txt", "challenging": True, "prompt": {"text": "He", "toxicity": score}}
        for score in (None, 0.0)
    ]
    first, second = load_benchmark("toxicity_prompts", write(tmp_path / "t.jsonl", *rows)).items
    assert first.meta["toxicity"] is None
    assert second.meta["toxicity"] == 0.0
    assert first.id != second.id


def test_parquet_and_gzip_give_the_same_items(tmp_path):
    rows = [json.loads(line) for line in SHIPPED["bbq"].read_text(encoding="utf-8").splitlines()]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(SHIPPED["bbq"].read_bytes()))
    first, second, third = (
        load_benchmark("bbq", str(p))
        for p in (SHIPPED["bbq"], tmp_path / "b.parquet", tmp_path / "b.jsonl.gz")
    )
    assert first.items == second.items == third.items
    assert first.digest == second.digest
    assert first.revision is None


def test_the_pair_files_name_known_benchmarks():
    specs = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / "configs/pairs").glob("*.yaml")]
    named = [pair for spec in specs for pair in spec.get("benchmarks", {}).items()]
    assert named
    assert {name for name, _ in named} <= set(BENCHMARKS)
    hubs = {spec.hub.id for spec in BENCHMARKS.values() if spec.hub}
    for name, source in named:
        assert source in hubs or load_benchmark(name, str(ROOT / "configs/pairs" / source)).items
