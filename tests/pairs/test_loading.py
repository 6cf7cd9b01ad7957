from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mechdiff.errors import PairError
from mechdiff.pairs import loading
from mechdiff.pairs.loading import ROWS_FILE, grow_embeddings, load_model, load_pair
from mechdiff.pairs.spec import FilePath, ModelId, ModelSpec, PairSpec
from tests.models import ARCHITECTURES, tokens
from tests.workspace import save_model


def spec(folder: Path, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(ModelId(str(folder)), adapter=FilePath(str(adapter)) if adapter else None)


def save_adapter(folder: Path, base: Path, seed: int = 0) -> PeftModel:
    """Save a LoRA adapter whose two factors are random; return the model that wears it, not merged."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        worn = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "o_proj", "up_proj"]))
        for name, parameter in worn.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
    worn.save_pretrained(folder)
    return worn.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_is_frozen_and_probed(arch: str, tmp_path: Path) -> None:
    loaded = load_model(spec(save_model(tmp_path, arch)))
    assert not loaded.model.training
    assert not [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    heads = (4, 12) if arch in ("qwen3", "gemma2") else (4, 8)
    assert (loaded.depth, loaded.width, loaded.num_heads, loaded.head_dim) == (4, 32, *heads)
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    assert loaded.tied == (head.weight is embedding.weight)
    assert loaded.device == torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("first", [None, 305])
def test_growing_embeddings(tied: bool, first: int | None, tmp_path: Path) -> None:
    folder = save_model(tmp_path, tie_word_embeddings=tied)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    old = model.get_input_embeddings().weight.clone()
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    ids = tokens(2, 7)
    before = model(ids).logits
    grow_embeddings(model, rows, first)
    at = first or 300
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is table) is tied
    assert torch.equal(table[:300], old)
    assert torch.equal(table[at : at + 5], rows)
    assert not table[300:at].any()
    assert model.config.vocab_size == len(table) == len(head) == at + 5
    after = model(ids).logits
    assert torch.allclose(after[..., :300], before, atol=1e-6)  # measured 0 in all four cases
    assert bool(after[..., at:].any()) is tied  # without rows of its own an untied head gives 0
    new = torch.tensor([[1, at + 2]])
    assert torch.equal(model.get_input_embeddings()(new)[0, 1], rows[2])


@torch.no_grad()
def test_writing_over_present_rows_leaves_the_size(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    grow_embeddings(model, torch.ones(2, 32), first_id=290)
    assert model.get_input_embeddings().weight.shape == (300, 32)
    assert torch.equal(model.get_input_embeddings().weight[290:292], torch.ones(2, 32))


@torch.no_grad()
def test_a_merged_adapter_acts_as_the_worn_one(base: Path, tmp_path: Path) -> None:
    worn = save_adapter(tmp_path / "adapter", base)
    merged = load_model(spec(base, tmp_path / "adapter"))
    assert not [name for name, _ in merged.model.named_modules() if "lora" in name]
    ids = tokens(3, 9)
    plain = load_model(spec(base)).model(ids).logits
    expected, got = worn(ids).logits, merged.model(ids).logits
    assert (expected - plain).abs().max() > 1e-2
    assert (expected - got).abs().max() < 1e-5  # measured 1.5e-7 (logits up to 0.44)


@torch.no_grad()
def test_an_adapter_may_bring_rows_and_a_tokenizer(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    save_file({"rows": rows.bfloat16()}, adapter / ROWS_FILE, {"first_id": "300"})
    longer = load_model(spec(base)).tokenizer
    longer.add_tokens(["бір", "екі", "үш", "төрт"])
    longer.save_pretrained(adapter / "tokenizer")
    loaded = load_model(spec(base, adapter))
    assert len(loaded.tokenizer) == 304
    assert torch.equal(loaded.model.get_input_embeddings().weight[300:], rows.bfloat16().float())
    (adapter / ROWS_FILE).unlink()
    with pytest.raises(PairError, match=r"304 tokens; allowed: up to 300, .*\(key: pair.base.id\)"):
        load_model(spec(base, adapter))


@pytest.mark.parametrize("harm", ["rows", "lora", "config"])
def test_an_adapter_of_another_model_is_refused(harm: str, base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(adapter, save_model(tmp_path / "wide", hidden_size=48) if harm == "lora" else base)
    if harm == "rows":
        save_file({"rows": torch.ones(2, 48)}, adapter / ROWS_FILE)
    if harm == "config":
        (adapter / "adapter_config.json").unlink()
    with pytest.raises(PairError, match=r"\(key: pair.tuned.adapter\)$") as caught:
        load_model(spec(base, adapter), role="tuned")
    assert "\n" not in str(caught.value)


def test_a_fingerprint_changes_with_weights_only(base: Path, tmp_path: Path) -> None:
    same = save_model(tmp_path / "same")
    other = save_model(tmp_path / "other", noise=0.01)
    adapters = [tmp_path / "a", tmp_path / "b"]
    for seed, adapter in enumerate(adapters):
        save_adapter(adapter, base, seed)
    found = [
        load_model(s).fingerprint
        for s in (spec(base), spec(same), spec(other), *(spec(base, adapter) for adapter in adapters))
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_pair_is_loaded_once_and_when_it_is_needed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: calls.append(k["role"]) or load(*a, **k))
    wanted = PairSpec(name="x", base=spec(base), tuned=spec(base), prompts=[FilePath("p")])
    pair = load_pair(wanted)
    assert calls == []
    assert load_pair(PairSpec(**vars(wanted))) is pair
    assert pair.base is pair.base
    assert pair.reference is None
    assert pair.shared.size == 300
    assert calls == ["base", "tuned"]
    renamed = load_pair(PairSpec(**vars(wanted) | {"name": "y"}))
    assert renamed is not pair
    assert load_pair(wanted) is not pair  # one pair is held at a time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_is_that_of_the_pair(dtype: str, base: Path) -> None:
    pair = PairSpec(name="x", base=spec(base), tuned=spec(base), prompts=[FilePath("p")], dtype=dtype)
    assert load_pair(pair).base.model.dtype == getattr(torch, dtype)
