"""A model of a pair in lm-evaluation-harness: its own Hugging Face model, edited while it reads and writes.

1. Weights, tokenizer and precision are those that the pair file names, loaded and checked as in any run.
2. A handle is measured from the last token of the prompt on. The harness scores a continuation after a
   context without telling the model where one ends, so requests are scored together whose contexts end at
   the same token.
3. What has no prompt, a text whose likelihood is rolled over windows, is edited at every token but the first
   of a window, as a handle for all positions is: the state of the first token is unlike all others.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from rich.progress import track
from torch import Tensor, nn

from mechdiff.errors import ConfigError, PairError
from mechdiff.handles.files import read
from mechdiff.handles.steering import steer
from mechdiff.lm_eval.__main__ import NAME
from mechdiff.pairs.loading import LoadedModel, load_pair
from mechdiff.study import read_pair

ROLES = ("base", "tuned", "reference")
PASSED_ON = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""What the harness's own model may be told besides; how it loads a model is settled by the pair."""
OWN = ("pair", "model", "handle", "alpha", "positions", "any_model")
AFTER_FIRST = 2
"""Number of the first token that is edited where there is no prompt, counted from 1."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, None for a window of a text; their tokens."""


@register_model(NAME)
class PairLM(HFLM):
    """One model of a pair, steered or as it is.

    Args:
        pair: A pair file.
        model: ``base``, ``tuned`` or ``reference``; the one that the handle is for, else ``tuned``.
        handle: A file of `mechdiff export`; the model stays as it is without one.
        alpha: Strength, 1 being the whole natural edit; the handle's own by default.
        positions: ``answer`` or ``all``; the handle's own by default.
        any_model: Whether to steer a model with other weights than the handle was made for.
        device: Where the model goes; a GPU where there is one, as in the harness.
        batch_size: As in the harness.
        max_batch_size: As in the harness.
        options: Those of the harness's Hugging Face model that are in `PASSED_ON`.

    Raises:
        UsageError: If an option is not known, or pair, model and handle do not go together.
    """

    def __init__(
        self,
        pair: str = "",
        model: str | None = None,
        handle: str | None = None,
        alpha: float | None = None,
        positions: Any = None,
        any_model: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        **options: Any,
    ) -> None:
        _check_options(pair, options)
        self.handle = read(handle) if handle else None
        role = model or (self.handle.manifest.model if self.handle else "tuned")
        loaded = _load(pair, role, device)
        super().__init__(
            loaded.model,
            backend="causal",
            tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness gives it a padding token
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **options,
        )
        _check_tied(loaded)
        self.alpha, self.rule = alpha, positions
        self._about: dict[str, Any] = {"pair": pair, "model": role, "weights": loaded.fingerprint}
        if self.handle is None:
            if alpha is not None or positions is not None:
                raise ConfigError("alpha and positions are those of a handle; give one (key: handle)")
            return
        with self._steered(any_model=any_model):  # the checks, hashing all weights, are made once
            m = self.handle.manifest
            strength = m.alpha if alpha is None else alpha
            cell = {"site": m.site, "edit": m.kind, "k": m.k, "alpha": strength, "solver": m.solver}
            self._about |= cell | {"handle": str(handle), "positions": positions or m.positions}

    def get_model_info(self) -> dict[str, Any]:
        """Say which model was run, for the harness's results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": "",
            "model_sha": self._about["weights"],
            "mechdiff": self._about,
        }

    def _steered(
        self, prompt_tokens: Sequence[int] | None = None, any_model: bool = True
    ) -> AbstractContextManager[None]:
        if self.handle is None:
            return nullcontext()
        return steer(
            self.model,
            self.handle,
            self.alpha,
            positions=self.rule,
            prompt_tokens=prompt_tokens,
            any_model=any_model,
        )

    def _begins(self, request: Request) -> int:
        """Return the number of the first token of a request that is edited, counted from 1."""
        assert self.handle is not None
        text, context, continuation = request
        if text is None or (self.rule or self.handle.manifest.positions) == "all":
            return AFTER_FIRST
        # The harness drops the last token, which predicts nothing, and cuts what is too long on the left.
        cut = max(0, len(context) + len(continuation) - (self.max_length + 1))
        return max(AFTER_FIRST, len(context) - cut)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.handle is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if self.batch_size == "auto" and override_bs is None and requests:  # once, not for every group
            longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
            override_bs = self._detect_batch_size([longest])
        alike: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self._begins(request)].append(number)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for begin, numbers in track(sorted(alike.items(), reverse=True), NAME, disable=disable_tqdm):
            with self._steered([begin]):
                found = super()._loglikelihood_tokens([requests[n] for n in numbers], True, override_bs)
            for number, score in zip(numbers, found, strict=True):
                scores[number] = score
        return scores

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        with self._steered():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)


def _check_options(pair: str, options: dict[str, Any]) -> None:
    """Refuse what the model cannot be told.

    Raises:
        ConfigError: If an option is not known, or no pair is named.
    """
    unknown = sorted(set(options) - set(PASSED_ON))
    if unknown:
        allowed = ", ".join([*OWN, *PASSED_ON])
        raise ConfigError(f"unknown option {unknown[0]}; allowed: {allowed} (key: --model_args)")
    if not pair:
        raise ConfigError("no pair is named; give pair=configs/pairs/....yaml (key: --model_args)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes were started; allowed: 1; pair.cards splits a model over GPUs")


def _load(pair: str, role: str, device: str | None) -> LoadedModel:
    """Load one model of a pair.

    Raises:
        ConfigError: If the device or the model is not known.
        PairError: If the pair has no such model.
    """
    if role not in ROLES:
        raise ConfigError(f"model is {role!r}; allowed: {', '.join(ROLES)} (key: --model_args)")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"cannot use device {device}: {str(error).splitlines()[0]} (key: --device)"
        ) from error
    loaded: LoadedModel | None = getattr(load_pair(read_pair(Path(pair)), place), role)
    if loaded is None:
        raise PairError(f"{pair} names no {role}; allowed: base, tuned (key: --model_args)")
    return loaded


def _check_tied(loaded: LoadedModel) -> None:
    """See that the harness, which ties weights as the configuration says, has changed none.

    Raises:
        PairError: If it has.
    """
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    tied = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    if tied != loaded.tied:
        raise PairError(
            f"{loaded.role} has an unembedding of its own but its configuration ties it to the embedding; "
            "allowed: a configuration with tie_word_embeddings: false (key: pair)"
        )
