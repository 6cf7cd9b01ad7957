"""The benchmarks run at tiny size, and their tables are drawn from what they leave."""

import json

import pytest
import torch

from benchmarks import gpu_multi, gpu_single, results
from benchmarks.shapes import SHAPES, TOKENIZER, build, texts
from mechdiff.pairs.tokenizers import load_tokenizer


def test_one_device(tmp_path):
    parts = ["ceilings", "correct", "extract", "planted", "moments", "sweep"]
    lines = gpu_single.main(
        ["--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--parts", *parts]
    )
    assert results.read(tmp_path / "results.jsonl") == lines
    found = {line["what"]: line for line in lines}
    assert len(lines) == 14
    planted = found["planted change, from stored states"]["figures"]
    assert (planted["layer"], planted["k"]) == (2, 4)
    assert planted["largest_angle_degrees"] < 1
    written = [line for what, line in found.items() if what.endswith("to HDF5 on disk")]
    assert all(line["ratios"]["of_the_null_writer"]["value"] > 0 for line in written)
    sweeps = [line["figures"] for what, line in found.items() if what.startswith("sweep")]
    assert len(sweeps) == 4
    assert all(figures["relative_difference_of_logits"] < 1e-5 for figures in sweeps)
    assert (tmp_path / "table.md").read_text() == results.tables(lines)


def test_several_processes(tmp_path):
    """One process is enough to run the whole way through the command line; two are for `test_ddp`."""
    options = ["--tiny", "--parts", "speed", "--processes", "1", "--out", str(tmp_path)]
    (line,) = gpu_multi.main([*options, "--work", str(tmp_path / "work")])
    assert line["what"] == "extract tiny by 1"
    assert line["figures"]["tokens"] >= 6000
    assert all(line["figures"][f"{role}_tokens_per_s"] > 0 for role in ("base", "tuned"))
    assert not (tmp_path / "work").exists()


def test_a_part_that_fails_stops_no_other(capsys):
    ran = []

    def wrong():
        raise ValueError("no")

    failed = results.run_parts({"a": wrong, "b": lambda: ran.append("b")}, print)
    assert (failed, ran) == (["a"], ["b"])
    assert "ValueError: no" in capsys.readouterr().err


def test_tables_are_drawn_between_the_marks(tmp_path):
    readme, kept = tmp_path / "README.md", tmp_path / "results.jsonl"
    readme.write_text(f"before\n{results.BEGIN}old\n{results.END}after\n")
    ratio = {"value": 0.971, "goal": 0.95}
    line = results.measurement("who", "what", {"tokens_per_s": 12345.6, "rows": 1000}, efficiency=ratio)
    results.append([json.loads(json.dumps(line))], kept)
    results.draw(readme, kept)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| what | tokens_per_s 1.235e+04; rows 1,000 | efficiency 0.971 (goal 0.95) |" in text
    results.draw(readme, kept)
    assert readme.read_text() == text


def test_the_committed_tables_are_those_of_the_committed_results():
    drawn = results.README.read_text().partition(results.BEGIN)[2].partition(results.END)[0]
    lines = results.read() if results.RESULTS.exists() else []
    assert drawn.strip() == results.tables(lines).strip()


def test_the_shape_is_that_of_llama_3_1_8b():
    with torch.device("meta"):
        model = build("8b", "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    flops = gpu_single._per_token("8b", 0)
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert flops == 2 * blocks
    assert len(load_tokenizer(TOKENIZER)) <= SHAPES["tiny"]["vocab_size"]


@pytest.mark.parametrize("tokens", [500, 3000])
def test_texts_repeat_and_hold_what_is_asked_for(tokens):
    tokenizer = load_tokenizer(TOKENIZER)
    first, again = (list(texts(tokens, tokenizer, 100)) for _ in range(2))
    assert first == again
    lengths = [len(tokenizer(p.text).input_ids) for p in first]
    assert tokens <= sum(lengths) < tokens + 150
    assert max(lengths) <= 150
