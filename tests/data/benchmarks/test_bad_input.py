"""What can be wrong with a benchmark, in one line each."""

import re

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from mechdiff.data.benchmarks.registry import load_benchmark
from mechdiff.errors import PromptError
from tests.data.benchmarks.rows import BBQ, MC, write


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("kk_mc", {"question": "Q", "A": "a"}, "lacks column B; found: A, question"),
        (
            "kk_mc",
            {k: v for k, v in MC.items() if k != "answer"},
            "lacks column answer or formatted_answer; found: A, B, C, D, category, question",
        ),
        ("kk_mc", MC | {"answer": "E"}, ":1: gold letter in answer is 'E'; allowed: A, B, C, D"),
        ("kk_mc", MC | {"answer": "А"}, "in Latin script"),
        ("kk_mc", MC | {"answer": None}, "gold letter in formatted_answer is None"),
        ("kk_mc", MC | {"C": " "}, ":1: option C is empty"),
        ("kk_mc", MC | {"C": None}, ":1: option C is empty"),
        ("kk_mc", MC | {"question": ""}, ":1: column question is empty"),
        ("gsm8k", {"question": "Q", "answer": "so 7"}, "it must end in '#### ' and a number"),
        ("gsm8k", {"question": "Q", "answer": "#### ,"}, "it must end in '#### ' and a number"),
        ("math", {"problem": "P", "solution": r"\boxed{3"}, "must hold a closed"),
        ("hh_rlhf", {"chosen": "Hi", "rejected": "Ho"}, "it must hold"),
        ("hh_rlhf", {"transcript": "Hi"}, "lacks column chosen; found: transcript"),
        ("toxicity_prompts", {"prompt": "He"}, "prompt is str; it must be a record"),
        ("bbq", BBQ | {"label": 3}, "label is 3; allowed: 0, 1, 2"),
        ("bbq", BBQ | {"label": 0}, "label 0 contradicts context_condition 'ambig'"),
        ("bbq", BBQ | {"context_condition": "dis"}, "allowed: ambig, disambig"),
        ("bbq", BBQ | {"answer_info": None, "ans2": "Cleo"}, "0 of the options"),
        ("bbq", BBQ | {"additional_metadata": None}, "nothing names the stereotyped answer"),
        ("roles", {"act": "Poet", "prompt": "\t"}, "column prompt is empty"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, name, row, message):
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        load_benchmark(name, write(tmp_path / "x.jsonl", row))
    assert "\n" not in str(caught.value)
    assert f"pair.benchmarks.{name}" in str(caught.value)


def test_bad_rows_may_be_left_out_and_are_then_listed(tmp_path):
    source = write(tmp_path / "x.jsonl", MC, MC | {"answer": "E"}, MC | {"D": ""}, MC)
    with pytest.raises(PromptError, match=r":2: gold letter.*; 2 of 4 rows are bad"):
        load_benchmark("kk_mc", source)
    data = load_benchmark("kk_mc", source, drop_bad=True)
    assert [i.id for i in data.items] == ["kk_mc-00000", "kk_mc-00003"]
    assert [re.search(r":(\d): ", reason)[1] for reason in data.dropped] == ["2", "3"]
    with pytest.raises(PromptError, match="holds no item"):
        load_benchmark("kk_mc", write(tmp_path / "y.jsonl", MC | {"answer": "E"}), drop_bad=True)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("gsm9k", "x.jsonl", "unknown benchmark 'gsm9k'; allowed: kk_mc, "),
        ("roles", None, "has no data set on the hub; give a file such as data/benchmarks/roles.jsonl"),
        ("gsm8k", "missing.jsonl", "no such file"),
        ("gsm8k", "words", "'words' is no file"),
    ],
)
def test_bad_names_and_sources(name, source, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        load_benchmark(name, source)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b"{\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: a line must be an object, keyed by column; found list"),
        ("a.jsonl", b"\xff\n", "is not UTF-8: byte 0"),
        ("a.jsonl", b"", "holds no item"),
        ("a.jsonl.gz", b"plain", "is not a gzip file"),
        ("a.parquet", b"plain", "is not a Parquet file"),
        ("a.csv", b"question,answer\n", "must end in .jsonl"),
    ],
)
def test_bad_files(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(PromptError, match=re.escape(message)):
        load_benchmark("gsm8k", str(tmp_path / file))


BAD = "; drop_bad leaves such rows out and lists them)"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"question": "Q", "A": "a"},
            "{file} lacks column B; found: A, question (key: pair.benchmarks.kk_mc)",
        ),
        (
            MC | {"answer": "E"},
            "{file}:1: gold letter in answer is 'E'; allowed: A, B, C, D in Latin script (key: "
            "pair.benchmarks.kk_mc" + BAD,
        ),
        (MC | {"C": " "}, "{file}:1: option C is empty (key: pair.benchmarks.kk_mc" + BAD),
    ],
)
def test_the_whole_line(tmp_path, row, line):
    file = write(tmp_path / "x.jsonl", row)
    with pytest.raises(PromptError) as caught:
        load_benchmark("kk_mc", file)
    assert str(caught.value) == line.format(file=file)


def test_the_whole_line_of_a_data_set_that_is_out_of_reach(monkeypatch):
    def fail(self, *args, **options):
        raise HTTPError("no route")

    def snapshot_download(name, **options):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(PromptError) as caught:
        load_benchmark("gsm8k")
    assert str(caught.value) == (
        "data set openai/gsm8k cannot be reached on the hub and is not in the local cache; give a local file "
        "with the same columns, such as data/benchmarks/word_problems.jsonl (key: pair.benchmarks.gsm8k)"
    )
