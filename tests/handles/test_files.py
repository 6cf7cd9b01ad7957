"""Handles survive their file bit for bit, and files that are wrong are refused in one line."""

import json
import pickle
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechdiff.errors import HandleError
from mechdiff.functional.edits import Known
from mechdiff.handles.files import FORMAT, NEEDS, check_kind, read, write
from mechdiff.handles.identity import weights_hash
from tests.handles.make import handle
from tests.models import WIDTH, tiny_model

STATES = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_handle_edits_as_before_once_it_was_a_file(tmp_path, kind, dtype):
    before = handle(kind=kind)
    after = read(write(tmp_path / "sub" / "h.safetensors", before))
    states = STATES.to(dtype)
    assert after.manifest == before.manifest
    assert torch.equal(after.change(states), before.change(states))
    assert not torch.equal(after.change(states), states)
    assert torch.equal(after.change(states, 0), states)
    names = {"basis", *NEEDS[kind]}
    assert set(load_file(tmp_path / "sub" / "h.safetensors")) == names  # and nothing that it does not need
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["h.safetensors"]


@pytest.mark.parametrize("kind", ["interchange", "reverse", "none", "magic"])
def test_an_edit_that_needs_a_second_model_stays_in_its_pair(kind):
    with pytest.raises(
        HandleError, match=r"allowed: add \(in base\), mapped \(in base\).*ablate \(in tuned\)"
    ):
        check_kind(kind)


def altered(folder, tensors=None, **manifest):
    """Write a handle, then change the file behind its back."""
    path = write(folder / "h.safetensors", handle(kind="mapped"))
    body = asdict(handle(kind="mapped").manifest) | manifest
    save_file(
        load_file(path) | (tensors or {}), path, metadata={"format": FORMAT, "manifest": json.dumps(body)}
    )
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format version 2; allowed: 1"),
        ({"version": "1"}, "format version '1'"),
        ({"kind": "magic"}, "edit is 'magic'"),
        ({"kind": "interchange"}, "needs the states of the other model"),
        ({"kind": "ablate"}, r"has neutral none; allowed: \(32,\)"),
        ({"k": 0}, "has k 0 with edit mapped; allowed: 1 to 32"),
        ({"k": 33}, "has k 33"),
        ({"k": 2}, r"has basis \(3, 32\), or a value that is not finite; allowed: \(2, 32\)"),
        ({"k": "3"}, "has k '3' in its manifest"),
        ({"width": 16}, "has basis"),
        ({"alpha": None}, "has alpha None in its manifest"),
        ({"alpha": float("inf")}, "has alpha inf"),
        ({"site": "head_z.1"}, "has site 'head_z.1'"),
        ({"site": "block 1"}, "unknown site 'block 1'"),
        ({"positions": "first"}, "has positions 'first'"),
        ({"tensors": {"basis": torch.ones(3, WIDTH)}}, "off orthonormal by"),
        ({"tensors": {"map_bias": torch.full((WIDTH,), torch.nan)}}, "map_bias .* not finite"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, says):
    with pytest.raises(HandleError, match=says) as error:
        read(altered(tmp_path, **change))
    assert "\n" not in str(error.value)


def test_a_shift_has_one_direction(tmp_path):
    with pytest.raises(HandleError, match="has k 3 with edit add; allowed: 1 to 1"):
        write(tmp_path / "h.safetensors", handle(kind="add", k=3))
    assert not list(tmp_path.iterdir())


def test_what_is_not_written_is_checked_as_what_is_read(tmp_path):
    wrong = handle(kind="amplify")
    with pytest.raises(HandleError, match="has basis none"):
        write(tmp_path / "h.safetensors", replace(wrong, known=Known()))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a file"),
        (pickle.dumps({"k": 1}), "is a pickled file, which is never read"),
        (b"PK\x03\x04" + bytes(64), "is a pickled file"),
        (b"GGUF" + bytes(64), "is not a safetensors file"),
        (b"", "is not a safetensors file"),
    ],
    ids=["missing", "pickle", "zip", "gguf", "empty"],
)
def test_other_files_are_refused_and_never_executed(tmp_path, content, says):
    path = tmp_path / "h.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HandleError, match=says):
        read(path)


def test_safetensors_of_something_else_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"basis": torch.eye(2)}, path, metadata={"format": "pt"})
    with pytest.raises(HandleError, match="holds no handle"):
        read(path)
    save_file({"basis": torch.eye(2)}, path, metadata={"format": FORMAT})
    with pytest.raises(HandleError, match="has no manifest"):
        read(path)


def test_a_model_has_one_hash_whatever_its_precision_and_another_once_it_is_changed():
    model = tiny_model(layers=2)
    found = weights_hash(model)
    assert re.fullmatch(r"[0-9a-f]{32}", found)
    assert weights_hash(tiny_model(layers=2).to(torch.bfloat16)) == found
    assert weights_hash(tiny_model(layers=2, seed=1)) != found
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] *= -1  # a single number
    assert weights_hash(model) != found
