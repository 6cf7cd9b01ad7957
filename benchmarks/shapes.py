"""Models of a real size with random weights, texts for them, and both as a user's files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from mechdiff.data.prompts import Prompt, load_prompts
from mechdiff.pairs.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "organisms" / "cultural_smol" / "tokenizer"
"""Its 49 thousand tokens are fewer than the rows of every embedding below, as they may be."""
_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_TINY = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "8b": _LLAMA,
    "wide": _LLAMA | {"vocab_size": 49408, "num_hidden_layers": 4},
    "tiny": _LLAMA | _TINY,
}
"""`8b` has the shape of Llama 3.1 8B; `wide` has four of its blocks, for checks that need no speed."""
RANK = 4
"""Rank of the difference between the two models of a pair."""


def build(shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Draw a model on a device, frozen."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    return model.eval().requires_grad_(False)


def texts(tokens: int, tokenizer: PreTrainedTokenizerBase, longest: int, seed: int = 0) -> Iterator[Prompt]:
    """Yield messages of 8 to `longest` tokens, until they have `tokens` together; every other is a target."""
    words = [w for p in load_prompts([ROOT / "data" / "prompts_fit.jsonl"]) for w in p.text.split()]
    draws, number = random.Random(seed), 0
    while tokens > 0:
        wanted = draws.randint(8, longest)
        text = " ".join(draws.choices(words, k=max(wanted // 3, 1)))  # three tokens to a word or fewer
        label = ("neutral", "target")[number % 2]
        name = f"b{number}"
        yield Prompt(name, text, "en", label, "fit", f"t{number}", f"s{number}")
        tokens -= len(tokenizer(text).input_ids)
        number += 1


def write_pair(folder: Path, shape: str, device: str, dtype: str, tokens: int, longest: int) -> Path:
    """Write a pair as a user has it: a model, an adapter of rank 4 on one block, prompts, and a pair file."""
    tokenizer = load_tokenizer(TOKENIZER)
    model = build(shape, device, getattr(torch, dtype))
    layer = model.config.num_hidden_layers // 2
    weight = model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
    out, inner = weight.shape
    model.save_pretrained(folder / "base", max_shard_size="5GB")
    del model
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / "base")
    draws = torch.Generator().manual_seed(1)
    factors = {"A": torch.randn(RANK, inner, generator=draws), "B": torch.randn(out, RANK, generator=draws)}
    name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
    scale = 0.02 / RANK**0.5  # entries of the change are as large as those of the matrix
    scaled = {f"{name}{k}.weight": (v * scale**0.5).contiguous() for k, v in factors.items()}
    (folder / "edit").mkdir()
    save_file(scaled, folder / "edit" / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [f"model.layers.{layer}.mlp.down_proj"],
        "inference_mode": True,
    }
    (folder / "edit" / "adapter_config.json").write_text(json.dumps(adapter))
    lines = [json.dumps(asdict(p), ensure_ascii=False) for p in texts(tokens, tokenizer, longest)]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pair = {
        "name": f"random_{shape}",
        "base": {"id": "./base"},
        "tuned": {"id": "./base", "adapter": "./edit"},
        "prompts": ["prompts.jsonl"],
        "dtype": dtype,
    }
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(pair))
    return path
