"""Find the same place in two tokenisations and two chat templates.

1. A prompt is rendered with the model's own chat template and tokenised; no special token is added twice.
2. Each token gets a name that does not depend on the tokenizer: within the user's text, the byte where
   it ends (a letter outside ASCII can be several tokens: characters are too coarse); before and after it, the
   index from the start or the end of the prompt, as long as it is the token that the template always gives.
3. Two prompts are joined on equal names. Template tokens count only within the common prefix and the common
   suffix of the two templates, compared by the bytes of their tokens. The rest is counted, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechdiff.errors import PromptError, told
from mechdiff.interventions.sites import OTHER, PREFIX, SUFFIX, USER
from mechdiff.pairs.tokenizers import vocabulary

REGIONS = ("prefix", "user", "suffix", "other")
"""Their names; a token of the last has no name of its own."""
DATE = "26 Jul 2024"
"""Given to templates that print today's date otherwise, so that runs repeat; the default of Llama 3.1."""
_PROBE = "\ue000\ue001"  # private-use characters: in no template, and merged with none of its tokens


@dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of one rendered prompt, with the name of each.

    Attributes:
        input_ids: Token ids.
        regions: `PREFIX`, `USER`, `SUFFIX` or `OTHER` of each token.
        offsets: Index from the start (`PREFIX`), byte of the user's text where the token ends (`USER`,
            from 1), or index from the end (`SUFFIX`, -1 is the last token before the answer); 0 for `OTHER`.
        user_bytes: Length of the user's text in bytes of UTF-8.
    """

    input_ids: list[int]
    regions: list[int]
    offsets: list[int]
    user_bytes: int

    def __len__(self) -> int:
        return len(self.input_ids)


class Alignment(NamedTuple):
    """Token positions that are the same place in two prompts, ascending in both; tensors `(pairs,)`, long.

    Attributes:
        positions_a: Positions in the first.
        positions_b: Positions in the second.
        regions: Region of each pair.
        offsets: Offset of each pair.
        missed_a: How many tokens of the first have no partner, by the name of their region.
        missed_b: The same for the second.
    """

    positions_a: Tensor
    positions_b: Tensor
    regions: Tensor
    offsets: Tensor
    missed_a: dict[str, int]
    missed_b: dict[str, int]


class _Template(NamedTuple):
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def render(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> str:
    """Return a user message as the model expects it, up to its answer; the text itself without a template.

    The template is run by transformers, in Jinja's sandbox: it sees the messages and reaches nothing else.

    Args:
        tokenizer: Tokenizer of the model, with its chat template if it has one.
        text: The user's message.
        system: A system message before it; by default whatever the template itself puts there.

    Raises:
        PromptError: If the chat template fails, or tries to reach out of the sandbox.
    """
    if not tokenizer.chat_template:
        return text if system is None else f"{system}\n\n{text}"
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=DATE
        )
    except Exception as error:  # a template is somebody's program, which can fail in any way
        raise PromptError(
            f"the chat template fails on {_short(text)}: {told(error)} (key: pair.prompts)"
        ) from error
    assert isinstance(rendered, str)
    return rendered


def encode(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> EncodedPrompt:
    """Render and tokenise a user message and name every token.

    Args:
        tokenizer: Tokenizer of the model, with its chat template if it has one.
        text: The user's message.
        system: A system message before it; see `render`.

    Raises:
        PromptError: If the template fails or changes the message, or its tokens cannot be located in it.
    """
    prompt = _located(tokenizer, text, system)
    if not prompt.input_ids:
        raise PromptError(f"{_short(text)} gives no token (key: pair.prompts)")
    template = _template(tokenizer, str(tokenizer.chat_template), len(tokenizer), system)
    # A message can merge with the template; what then differs from the template's usual tokens has no name.
    ids, regions, offsets = prompt.input_ids, list(prompt.regions), list(prompt.offsets)
    usual_start = _common(ids, template.prefix)
    usual_end = len(ids) - _common(ids[::-1], template.suffix[::-1])
    for i, region in enumerate(regions):
        if (region == PREFIX and i >= usual_start) or (region == SUFFIX and i < usual_end):
            regions[i], offsets[i] = OTHER, 0
    return EncodedPrompt(ids, regions, offsets, prompt.user_bytes)


def common_start(prompts: Sequence[EncodedPrompt]) -> int:
    """Count the leading template tokens that all prompts have in common; each has at least one token more."""
    lengths = [next((i for i, r in enumerate(p.regions) if r != PREFIX), len(p) - 1) for p in prompts]
    length = min(lengths, default=0)
    return length if len({tuple(p.input_ids[:length]) for p in prompts}) == 1 else 0


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[bytes], list[bytes]]:
    """Return the bytes of each token that the template puts before and after every message.

    A token whose bytes are unknown ends the list on its side, since nothing beyond it can be compared.
    """
    template = _template(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    pieces = vocabulary(tokenizer).pieces
    return _known(pieces, template.prefix), _known(pieces, template.suffix[::-1])[::-1]


def common_template(
    prefix_a: Sequence[bytes], prefix_b: Sequence[bytes], suffix_a: Sequence[bytes], suffix_b: Sequence[bytes]
) -> tuple[int, int]:
    """Return how many tokens two templates share at their start and at their end.

    Args:
        prefix_a: Bytes of the tokens before the user's text in the first template.
        prefix_b: The same in the second.
        suffix_a: Bytes of the tokens after the user's text in the first template.
        suffix_b: The same in the second.
    """
    return _common(prefix_a, prefix_b), _common(suffix_a[::-1], suffix_b[::-1])


def align(a: EncodedPrompt, b: EncodedPrompt, n_prefix: int, n_suffix: int) -> Alignment:
    """Pair the tokens of two encodings of one message that are the same place.

    Args:
        a: The message as the first model sees it.
        b: The message as the second model sees it.
        n_prefix: Tokens that the two templates share at their start, from `common_template`.
        n_suffix: Tokens that they share at their end.
    """
    names_a, names_b = (_names(prompt, n_prefix, n_suffix) for prompt in (a, b))
    joined = [name for name in names_a if name in names_b]
    regions, offsets = torch.tensor(joined, dtype=torch.long).reshape(-1, 2).T
    positions_a = torch.tensor([names_a[name] for name in joined], dtype=torch.long)
    positions_b = torch.tensor([names_b[name] for name in joined], dtype=torch.long)
    missed_a, missed_b = (_missed(p, taken.tolist()) for p, taken in ((a, positions_a), (b, positions_b)))
    return Alignment(positions_a, positions_b, regions, offsets, missed_a, missed_b)


def collate(encoded: Sequence[EncodedPrompt], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Stack prompts, padded on the right.

    Args:
        encoded: At least one prompt.
        pad_id: Id to fill with; 0 if the tokenizer has none, since padding is masked anyway.

    Returns:
        Ids `(prompts, longest)` and the attention mask of the same shape, both long.
    """
    assert encoded, "nothing to collate"
    lengths = torch.tensor([len(prompt) for prompt in encoded])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full(mask.shape, 0 if pad_id is None else pad_id)
    for row, prompt in zip(ids, encoded, strict=True):
        row[: len(prompt)] = torch.tensor(prompt.input_ids)
    return ids, mask


@lru_cache(maxsize=8)
def _template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, size: int, system: str | None = None
) -> _Template:
    """The other arguments are part of the key because a tokenizer can be given a template or tokens."""
    prompt = _located(tokenizer, _PROBE, system)
    ids, regions = prompt.input_ids, prompt.regions
    prefix, suffix = (
        tuple(i for i, r in zip(ids, regions, strict=True) if r == side) for side in (PREFIX, SUFFIX)
    )
    return _Template(prefix, suffix)


def _located(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> EncodedPrompt:
    """Encode, trusting that every template token is the usual one."""
    rendered, start, end, trimmed = _user_span(tokenizer, text, system)
    # A template writes the special tokens itself; without one they are the tokenizer's to add.
    batch = tokenizer(
        rendered,
        add_special_tokens=not tokenizer.chat_template,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    added = batch["special_tokens_mask"]
    before = len(list(takewhile(bool, added)))
    stop = len(added) - len(list(takewhile(bool, added[before:][::-1])))  # an added end of text is dropped
    ids = list(batch["input_ids"][:stop])
    spans = _byte_spans(tokenizer, rendered, ids[before:], batch["offset_mapping"][before:stop])
    regions, offsets = [PREFIX] * before, list(range(before))
    for i, (first, last, exact) in enumerate(spans, before):
        if exact and start < last <= end:
            region, offset = USER, trimmed + last - start
        elif last <= start:
            region, offset = PREFIX, i
        elif first >= end:
            region, offset = SUFFIX, i - len(ids)
        else:
            region, offset = OTHER, 0
        regions.append(region)
        offsets.append(offset)
    return EncodedPrompt(ids, regions, offsets, len(text.encode()))


def _user_span(
    tokenizer: PreTrainedTokenizerBase, text: str, system: str | None
) -> tuple[str, int, int, int]:
    """Return the rendered prompt, the bytes where the text starts and ends in it, and how many it trims."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{_short(text)} is not valid Unicode: {error.reason} (key: pair.prompts)"
        ) from error
    rendered = render(tokenizer, text, system)
    head, found, tail = render(tokenizer, _PROBE, system).rpartition(_PROBE)
    if not found:
        raise PromptError("the chat template does not contain the user's message (key: pair.prompts)")
    body = rendered[len(head) : len(rendered) - len(tail)]
    if not (rendered == head + body + tail and body in text):
        # The template depends on the message. An equal text in its system block comes first: take the last.
        body = text.strip()
        head = rendered[: max(rendered.rfind(body), 0)]
    trimmed, _, rest = text.partition(body) if body else (text, "", "")
    if not rendered.startswith(head + body) or trimmed.strip() or rest.strip():
        raise PromptError(f"the chat template changes the message {_short(text)} (key: pair.prompts)")
    start = len(head.encode())
    return rendered, start, start + len(body.encode()), len(trimmed.encode())


def _byte_spans(
    tokenizer: PreTrainedTokenizerBase, rendered: str, ids: list[int], characters: Sequence[tuple[int, int]]
) -> list[tuple[int, int, bool]]:
    """Return each token's first byte, last byte (exclusive), and whether that end is exact."""
    known = vocabulary(tokenizer).pieces
    pieces = [piece for i in ids if (piece := known[i]) is not None]
    data = rendered.encode()
    if len(pieces) == len(ids) and b"".join(pieces) == data:
        ends = list(accumulate(map(len, pieces)))
        starts = [0, *ends[:-1]]
    else:
        # The tokenizer rewrites its input (puts a space before it, composes letters): use its offsets.
        at = list(accumulate((len(char.encode()) for char in rendered), initial=0))
        starts, ends = [at[first] for first, _ in characters], [at[last] for _, last in characters]
        if starts != sorted(starts) or ends != sorted(ends) or (ids and not any(ends)):
            raise PromptError(f"the tokens of {rendered[-40:]!r} cannot be located in it (key: pair.prompts)")
    # Tokens that share a character overlap; only the last of them ends where its offset says. A gap that is
    # not blank holds letters that were dropped or composed with the one before: that end is unknown too.
    following = zip([*starts[1:], len(data)], [*ends[1:], len(data) + 1], strict=True)
    exact = [
        last <= first and last < beyond and not data[last:first].strip()
        for last, (first, beyond) in zip(ends, following, strict=True)
    ]
    return list(zip(starts, ends, exact, strict=True))


def _names(prompt: EncodedPrompt, n_prefix: int, n_suffix: int) -> dict[tuple[int, int], int]:
    """Return the position of each name that the other side may know."""
    names = {}
    for position, (region, offset) in enumerate(zip(prompt.regions, prompt.offsets, strict=True)):
        shared = {PREFIX: offset < n_prefix, USER: True, SUFFIX: offset >= -n_suffix, OTHER: False}
        if shared[region]:
            names[region, offset] = position
    return names


def _missed(prompt: EncodedPrompt, taken: list[int]) -> dict[str, int]:
    left = Counter(prompt.regions) - Counter(prompt.regions[position] for position in taken)
    return {name: left[region] for region, name in enumerate(REGIONS)}


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _known(pieces: Sequence[bytes | None], ids: Sequence[int]) -> list[bytes]:
    known = []
    for piece in (pieces[i] for i in ids):
        if piece is None:
            break
        known.append(piece)
    return known


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
