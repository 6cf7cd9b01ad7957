"""What the examples start from: a model, a prompt as tokens, its rows in a store, and a handle."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechdiff import ActivationStore, encode, load_pair, load_prompts
from mechdiff.handles.files import Handle, read
from mechdiff.study import read_pair


class Given(NamedTuple):
    """What an example is given.

    Attributes:
        model: The model that the handle is for; any transformers model with its weights will do.
        tokenizer: Its tokenizer.
        ids: The first prompt of the store as it was read, `(1, positions)`.
        positions: Which of these positions the store keeps, `(rows,)`.
        states: Their states at the handle's site, `(rows, d_model)`, float32.
        handle: The handle.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    positions: Tensor
    states: Tensor
    handle: Handle


def given(pair: str, store: str, handle: str) -> Given:
    """Read the three.

    Args:
        pair: A pair file.
        store: Folder of a store of that model, `stores/<key>`, which holds the handle's site.
        handle: A file of `mechdiff export`.
    """
    spec, edit = read_pair(Path(pair)), read(handle)
    loaded = getattr(load_pair(spec), edit.manifest.model)
    kept = ActivationStore.open(store)
    rows = torch.nonzero(kept.rows.example == 0)[:, 0]
    texts = {prompt.id: prompt.text for prompt in load_prompts(spec.prompts)}
    ids = encode(loaded.tokenizer, texts[kept.examples[0].id]).input_ids
    states = kept.read(edit.site, rows)
    return Given(loaded.model, loaded.tokenizer, torch.tensor([ids]), kept.rows.position[rows], states, edit)
