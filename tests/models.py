"""Tiny random models of several architectures, built from configurations."""

from __future__ import annotations

from functools import partial

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
WIDTH = 32
HEADS = 4

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox"]


def tiny_config(arch: str, layers: int = 4) -> PreTrainedConfig:
    """Return a small configuration; Gemma 2 and Qwen 2 attend to a window of 4 in every other block."""
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    grouped = {**shared, "num_key_value_heads": 2}
    windows = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if arch == "llama":
        return LlamaConfig(**grouped)
    if arch == "qwen2":
        return Qwen2Config(**grouped, use_sliding_window=True, sliding_window=4, layer_types=windows)
    if arch == "qwen3":
        return Qwen3Config(**grouped, head_dim=12)
    if arch == "gemma2":
        return Gemma2Config(**grouped, head_dim=12, sliding_window=4, layer_types=windows)
    if arch == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=HEADS,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    if arch == "gpt_neox":
        return GPTNeoXConfig(**shared)
    raise ValueError(f"unknown architecture {arch!r}; allowed: {', '.join(ARCHITECTURES)}")


def tiny_model(
    arch: str = "llama", layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a frozen model whose biases and norms are random too: nothing is an identity by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, layers), dtype=dtype)
        draws = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=dtype)
            parameter.data.add_(0.2 * noise if parameter.ndim == 1 else 0.1 * noise)
    return model.eval().requires_grad_(False)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids `(rows, length)`, none of them padding."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def keep_double(model: PreTrainedModel) -> PreTrainedModel:
    """Let the norms of a float64 model stay in float64, which the library casts to float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]
    return model


def _rms_norm(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    scaled = hidden * (hidden.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return scaled * (norm.weight + (1 if type(norm).__name__.startswith("Gemma") else 0))
