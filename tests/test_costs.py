"""What a run would cost: counted from its plan, bytes as they are on disk, and nothing left behind."""

from pathlib import Path

import pytest

from mechdiff import costs
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.sites import Site
from mechdiff.modules import CLTMap, SteeringSubspace
from tests.toys import loaded, prompts
from tests.workspace import config, everything, run, small, workspace


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_bytes_and_rows_are_those_of_the_store(
    dtype: str, positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "PROBE", 0.0)
    spec = ExtractionSpec(str(tmp_path), positions, dtype)
    sites = [Site(0), Site(2, "head_z")]
    cost = costs.extraction(loaded(), prompts(), sites, spec)
    store = ensure_store(loaded(), prompts(), sites, spec, trainer_kwargs={"enable_progress_bar": False})
    assert cost.rows == len(store)
    width = sum(store.width(site) for site in sites)
    assert cost.stored == cost.rows * width * {"float32": 4, "bfloat16": 2}[dtype]
    assert cost.seconds > 0


def test_operations_grow_with_blocks_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "PROBE", 0.0)
    spec, texts = ExtractionSpec(tokens_per_batch=256), prompts()
    one, two = (costs.extraction(loaded(), texts, [Site(layer)], spec) for layer in (0, 1))
    assert two.operations == 2 * one.operations
    assert (two.rows, two.tokens, two.stored) == (one.rows, one.tokens, one.stored)
    part = costs.extraction(loaded(), texts[: len(texts) // 2], [Site(0)], spec)
    assert 0.4 < part.operations / one.operations < 0.6
    block = loaded().model.model.layers[0]
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert one.operations > 2 * weights * one.tokens


def test_a_fit_in_closed_form_says_what_it_takes() -> None:
    one = CLTMap.operations(1000, 1, 32, 32)
    assert CLTMap.operations(1000, 3, 32, 32) == 3 * one
    assert CLTMap.operations(1000, 3, 32, 32, True) > 3 * one
    assert SteeringSubspace.operations(1000, 1, 32, 32) is None


def test_a_dry_run_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "PROBE", 0.1)
    workspace(tmp_path)
    before = everything(tmp_path)
    assert run("fit", *config(), *small(tmp_path / "pair.yaml", tmp_path), "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said if not line.startswith(" ")][:3] == [
        "extract base",
        "extract tuned",
        "fit",
    ]
    assert said[1].startswith("  2 sites up to block 2")
    assert said[-1].startswith("in all")
    assert everything(tmp_path) == before
