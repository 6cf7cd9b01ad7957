"""A change of the vocabulary alone: other ids for the same tokens, and tokens that no message has.

Next-token distributions over the shared tokens, and all states, are those of the base.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechdiff.config import SEED
from mechdiff.errors import PairError
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import is_tied
from mechdiff.pairs.loading import LoadedModel, grow_embeddings
from mechdiff.pairs.organisms.planted import Planted, Truth, copy_model, planted


def plant_vocabulary(base: LoadedModel, extra: int = 16, seed: int = SEED) -> Planted:
    """Shuffle the ids of all tokens but the control tokens, and add tokens of random embeddings.

    Args:
        base: The model to copy.
        extra: Number of added tokens.
        seed: Seed of the order and of the embeddings.

    Raises:
        PairError: If `extra` is negative, or the tokenizer is not a fast one.
    """
    if extra < 0:
        raise PairError(f"extra is {extra}; allowed: 0 or more (key: extra)")
    tokenizer, new = _shuffled(base.tokenizer, generator(seed, "vocabulary"))
    tokenizer.add_tokens([AddedToken(f"<added-{i}>", normalized=False) for i in range(extra)])
    model = copy_model(base.model)
    head, tied = model.get_output_embeddings(), is_tied(model)
    tables = [model.get_input_embeddings(), *([] if tied or head is None else [head])]
    for table in tables:
        assert isinstance(table, nn.Embedding | nn.Linear)
        table.weight.data = _moved(table.weight.data, new)
        if isinstance(table, nn.Linear) and table.bias is not None:
            table.bias.data = _moved(table.bias.data, new)
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, Tensor)
    draws = torch.randn(
        extra, rows.shape[1], generator=generator(seed, "vocabulary", "rows"), dtype=torch.float64
    )
    grow_embeddings(model, (rows.double().std() * draws.to(rows.device)).to(rows), len(base.tokenizer))
    model.requires_grad_(False)
    components = ("embed",) if tied else ("embed", "head")
    changed = zip(base.model.named_parameters(), model.named_parameters(), strict=True)
    names = tuple(name for (name, old), (_, now) in changed if old.data_ptr() != now.data_ptr())
    truth = Truth("vocabulary", seed, 0.0, components, tensors=names)
    sibling, truth = planted(base, model, truth)
    return replace(sibling, tokenizer=tokenizer), truth


def _shuffled(
    tokenizer: PreTrainedTokenizerBase, draws: torch.Generator
) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Return a tokenizer with other ids, and the new id of each old one, `(size,)`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PairError("the tokenizer has no fast backend, whose ids could be shuffled (key: pair.base.id)")
    state = json.loads(backend.to_str())
    fixed = {token["id"] for token in state["added_tokens"]}
    movable = torch.tensor(sorted(set(state["model"]["vocab"].values()) - fixed))
    new = torch.arange(len(tokenizer))
    new[movable] = movable[torch.randperm(len(movable), generator=draws)]
    state["model"]["vocab"] = {token: int(new[i]) for token, i in state["model"]["vocab"].items()}
    options = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options), new


def _moved(table: Tensor, new: Tensor) -> Tensor:
    """Put the row of each old id where its new one is; rows of no token stay."""
    moved = table.clone()
    moved[new.to(table.device)] = table[: len(new)]
    return moved
