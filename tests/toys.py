"""A tiny model with a trained tokenizer and a chat template, and prompts in families, made on the spot."""

from __future__ import annotations

from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechdiff.data.prompts import Prompt
from mechdiff.pairs.loading import LoadedModel
from tests.models import tiny_config

SPECIAL = ["<|end|>", "<|sys|>", "<|user|>", "<|bot|>"]
PLAIN = (
    "<|user|>{{ messages[0]['content'] }}<|end|>\n{% if add_generation_prompt %}<|bot|>answer\n{% endif %}"
)
SYSTEM = "<|sys|>You are kind.<|end|>\n" + PLAIN
OTHER_END = PLAIN.replace("<|bot|>answer", "<|bot|>")

_PATTERNS = {
    "en": [
        "tell me a story about {}",
        "why do people like {} so much?",
        "what is {}",
        "list facts on {} now",
    ],
    "kk": ["{} туралы айтып берші", "{} деген не?", "неге {} ұнайды?", "маған {} жайлы жаз"],
}
_TOPICS = {
    "en": ["snow", "old bread", "the river", "horses", "a blue door", "rain in May", "wool", "chess"],
    "kk": ["қар", "нан", "өзен", "жылқы", "көк есік", "жаңбыр", "жүн", "шахмат ойыны"],
}


def prompts(families: int = 3) -> list[Prompt]:
    """Return `families` families per language and label, each of two templates crossed with two topics."""
    found = []
    for lang in ("en", "kk"):
        for label in ("target", "neutral"):
            for family in range(families):
                for t in range(2):
                    for s in range(2):
                        template, topic = (
                            _PATTERNS[lang][(family + t) % 4],
                            _TOPICS[lang][(2 * family + s) % 8],
                        )
                        name = f"{lang}-{label[0]}-{family}"
                        text = f"{template.format(topic)} {'please ' * (label == 'target')}{family}"
                        where = {"template": f"{name}-t{t}", "topic": f"{name}-s{s}"}
                        found.append(Prompt(f"{name}-{t}{s}", text, lang, label, "fit", **where))
    return found


@lru_cache
def tokenizer(size: int = 300, template: str | None = PLAIN) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with `size` tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([p.text for p in prompts()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = template
    return fast


def loaded(
    size: int = 300,
    template: str | None = PLAIN,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    context: int = 256,
) -> LoadedModel:
    """Build a random Llama of four blocks around a tokenizer."""
    fast = tokenizer(size, template)
    config = tiny_config("llama")
    config.vocab_size, config.max_position_embeddings = len(fast), context
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return LoadedModel(
        "base", model, fast, f"toy-{size}-{seed}", depth=4, width=32, num_heads=4, head_dim=8, tied=False
    )
