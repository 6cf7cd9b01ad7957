"""The hub, its cache, and being without either."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from pyarrow import parquet

from mechdiff.data.benchmarks.registry import BENCHMARKS, load_benchmark
from mechdiff.errors import PromptError
from tests.data.benchmarks.rows import HH


def fake_repository(folder: Path) -> Path:
    """A snapshot laid out like a hub data set with configurations declared in its card."""
    parts = []
    for name in ("algebra", "geometry"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(
            [{"problem": name, "level": "Level 1", "type": name, "solution": r"\boxed{1}"}]
        )
        parquet.write_table(table, folder / name / "test-00000-of-00001.parquet")
        parts.append(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*.parquet"
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n" + "\n".join(parts) + "\n---\n# Card\n", encoding="utf-8"
    )
    return folder


@pytest.fixture
def arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_hub_data_is_read_at_the_pinned_commit_with_all_configurations(tmp_path, monkeypatch, arrow_cache):
    commit = "c" * 40
    asked = {}

    def snapshot_download(name, **options):
        asked[name] = options
        return str(fake_repository(tmp_path / commit))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = BENCHMARKS["math"]
    small = replace(spec, hub=replace(spec.hub, configs=("algebra", "geometry")))
    monkeypatch.setitem(BENCHMARKS, "math", small)
    data = load_benchmark("math")
    assert [i.question for i in data.items] == ["algebra", "geometry"]
    assert data.revision == commit
    assert asked["EleutherAI/hendrycks_math"]["revision"] == spec.hub.revision
    assert asked["EleutherAI/hendrycks_math"]["local_files_only"] is True
    again = load_benchmark("math", str(tmp_path / commit))  # a folder needs no hub
    assert [i.question for i in again.items] == ["algebra", "geometry"]
    monkeypatch.setitem(
        BENCHMARKS, "math", replace(small, hub=replace(spec.hub, configs=("algebra",), split="dev"))
    )
    with pytest.raises(PromptError, match=r"has no split 'dev'; found test \(key: pair\.benchmarks\.math\)"):
        load_benchmark("math")


def test_a_folder_inside_the_repository_is_read_alone(tmp_path, arrow_cache):
    row = json.dumps({"chosen": HH + " Good.", "rejected": HH + " Bad."}) + "\n"
    for folder, count in (("harmless-base", 1), ("helpful-base", 2)):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(row.encode() * count))
    assert len(load_benchmark("hh_rlhf", str(tmp_path)).items) == 1


def test_an_id_may_name_its_own_revision(monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"]))
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for source in ("openai/gsm8k@abc", "openai/gsm8k", "someone/gsm8k-copy"):
        with pytest.raises(PromptError):
            load_benchmark("gsm8k", source)
    assert asked == [
        ("openai/gsm8k", "abc"),
        ("openai/gsm8k", BENCHMARKS["gsm8k"].hub.revision),
        ("someone/gsm8k-copy", None),
    ]


def test_offline_says_which_file_to_use_instead():
    message = (
        r"data set openai/gsm8k is not in the local cache and HF_HUB_OFFLINE is set; give a local file with "
        r"the same columns, such as data/benchmarks/word_problems\.jsonl \(key: pair\.benchmarks\.gsm8k\)"
    )
    with pytest.raises(PromptError, match=message):
        load_benchmark("gsm8k")


def test_a_hub_out_of_reach_is_one_line_and_the_cache_is_asked(monkeypatch):
    def fail(self, *args, **options):
        raise HTTPError("no route")

    asked = []

    def snapshot_download(name, **options):
        asked.append(options["local_files_only"])
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(PromptError, match=r"^data set openai/gsm8k cannot be reached .*jsonl.*$") as caught:
        load_benchmark("gsm8k")
    assert "\n" not in str(caught.value)
    assert asked == [True]
