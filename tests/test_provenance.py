"""A run says where its numbers come from."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from mechdiff import provenance as room
from mechdiff.extraction.extractor import store_identity
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.pairs.alignment import template_tokens
from mechdiff.pairs.loading import load_pair
from mechdiff.pairs.spec import FilePath, ModelId, ModelSpec, PairSpec
from mechdiff.provenance import PACKAGES, provenance
from tests.workspace import workspace


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PairSpec:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    base, tuned = (ModelSpec(ModelId(str(folder / name))) for name in ("base", "tuned"))
    files = [FilePath(str(folder / name)) for name in ("fit.jsonl", "eval.jsonl")]
    openings = FilePath(str(folder / "openings.jsonl"))
    return PairSpec(name="tiny", base=base, tuned=tuned, prompts=files, openings=openings)


def test_everything_that_changes_a_number_is_named(spec: PairSpec) -> None:
    found = provenance(load_pair(spec), 17, {"source": "abc"})
    assert json.loads(json.dumps(found)) == found
    assert set(found["packages"]) == set(PACKAGES)
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (found["seed"], found["dtype"], found["device"]) == (17, "float32", "cpu")
    assert found["models"]["base"]["weights"] != found["models"]["tuned"]["weights"]
    assert found["models"]["base"]["tokenizer"] == found["models"]["tuned"]["tokenizer"]
    assert found["models"]["base"]["vocabulary"] == found["shared_vocabulary"] == 300
    assert set(found["prompts"]) == {"fit.jsonl", "eval.jsonl", "openings.jsonl"}
    assert found["stores"] == {"source": "abc"}
    assert provenance(load_pair(spec), 17, {"source": "abc"}) == found


def test_a_changed_text_changes_its_hash(spec: PairSpec) -> None:
    before = provenance(load_pair(spec), 17, {})["prompts"]
    path = Path(spec.prompts[1])
    path.write_text(path.read_text() + "\n")
    after = provenance(load_pair(spec), 17, {})["prompts"]
    assert [name for name in before if before[name] != after[name]] == ["eval.jsonl"]


def test_a_tokenizer_that_was_used_has_the_same_hash(spec: PairSpec) -> None:
    pair = load_pair(spec)
    before = provenance(pair, 17, {})["models"]
    pair.base.tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert provenance(pair, 17, {})["models"] == before


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_model_is_named_as_in_the_manifest_of_its_store(role: str, spec: PairSpec) -> None:
    pair = load_pair(spec)
    found = provenance(pair, 17, {})
    model = getattr(pair, role)
    identity = store_identity(model, [], ExtractionSpec(), *template_tokens(model.tokenizer))
    named = found["models"][role]
    assert (named["tokenizer"], named["template"]) == (identity.tokenizer, identity.template)
    assert f"{named['weights']}/{found['dtype']}" == identity.model


def test_outside_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(room.subprocess, "run", fail)
    assert room._commit() is None
