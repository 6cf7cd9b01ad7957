"""Load two tokenizers and find the tokens they share.

1. Every id of a vocabulary is given the bytes that it stands for in a text, whatever its notation.
2. Two tokens are the same if their bytes are equal and both are special or neither is; their ids may differ.
3. Rows of an embedding table beyond the tokenizer are padding, not tokens, and are never shared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mechdiff.errors import PairError, told
from mechdiff.pairs.sources import hub_folder

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
Key = bytes | tuple[bytes] | tuple[bytes, bool, int]
"""Bytes of a token; in a tuple, of a special token, or with a count, of a further id of the same bytes."""
_BETWEEN = "\U0010ffff"  # no character, so in no token
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# The printable stand-ins of byte-level BPE, back to bytes; what stands for none cannot be encoded as Latin-1.
_BYTE_LEVEL = dict.fromkeys(range(256), 0xFFFF) | {ord(c): byte for byte, c in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of one tokenizer stand for.

    Attributes:
        pieces: Bytes of each id; None for an id that is not in use or whose bytes cannot be known.
        special: Ids of control tokens, such as the begin of a text; their bytes are those of their name.
        fallback: Ids that SentencePiece keeps for a single byte; a piece of the same byte goes before them.
    """

    pieces: tuple[bytes | None, ...]
    special: frozenset[int]
    fallback: frozenset[int]


class SharedVocab:
    """The tokens that two tokenizers have in common.

    Attributes:
        base_ids: Ids in the base vocabulary, `(size,)`, ascending.
        tuned_ids: Ids of the same tokens in the tuned vocabulary, `(size,)`.
        size: Number of shared tokens.
        base_coverage: Share of the base tokens that are shared.
        tuned_coverage: Share of the tuned tokens that are shared.

    Raises:
        PairError: If no token is shared.
    """

    def __init__(self, tok_base: PreTrainedTokenizerBase, tok_tuned: PreTrainedTokenizerBase) -> None:
        self._base, self._tuned = vocabulary(tok_base), vocabulary(tok_tuned)
        base, tuned = _by_bytes(self._base), _by_bytes(self._tuned)
        pairs = sorted((i, tuned[key]) for key, i in base.items() if key in tuned)
        if not pairs:
            raise PairError("the two tokenizers share no token (keys: pair.base.id, pair.tuned.id)")
        self.base_ids, self.tuned_ids = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
        self.size = len(pairs)
        self.base_coverage = self.size / len(base)
        self.tuned_coverage = self.size / len(tuned)

    @property
    def identical(self) -> bool:
        """Whether every id means the same in both, so that nothing has to be restricted."""
        return self._base == self._tuned and torch.equal(self.base_ids, self.tuned_ids)

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the shared ids of one of the two tokenizers, `(size,)`, in the order of the base ids.

        Raises:
            PairError: If the tokenizer is neither of the two.
        """
        known = vocabulary(tokenizer)
        if known == self._base:
            return self.base_ids
        if known == self._tuned:
            return self.tuned_ids
        raise PairError("this tokenizer is not one of the two whose shared vocabulary is asked about")

    def mask(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> Tensor:
        """Mark the shared ids of one of the two tokenizers.

        Args:
            tokenizer: Either of them.
            rows: Length of the mask, such as the rows of an embedding table; the vocabulary's by default.

        Returns:
            Booleans `(rows,)`.
        """
        mask = torch.zeros(rows or len(vocabulary(tokenizer).pieces), dtype=torch.bool)
        mask[self.ids(tokenizer)] = True
        return mask


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load one tokenizer; the network is asked only for what is not on disk, and never for code.

    Args:
        source: Folder, GGUF file, or hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        PairError: If it cannot be had.
    """
    path = Path(source)
    folder, gguf = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    key = "keys: pair.base.id, pair.tuned.id"
    if not folder.is_dir():
        folder = hub_folder(str(source), revision, "pair.base.id or pair.tuned.id", weights=False)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), gguf_file=gguf, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises no narrower class for a malformed file
        raise PairError(f"{source} holds no tokenizer that can be read: {told(error)} ({key})") from error


def load_tokenizers(base_id: str, tuned_id: str) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Load the tokenizers of a pair.

    Args:
        base_id: Folder, GGUF file, or hub id of the base model.
        tuned_id: The same of the tuned model.

    Raises:
        PairError: If one cannot be had.
    """
    return load_tokenizer(base_id), load_tokenizer(tuned_id)


def shared_vocab_maps(tok_base: PreTrainedTokenizerBase, tok_tuned: PreTrainedTokenizerBase) -> SharedVocab:
    """Return the tokens that two tokenizers share, by their bytes, with their ids in each."""
    return SharedVocab(tok_base, tok_tuned)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes that each id stands for; None where that cannot be known.

    Special tokens have the bytes of their name; `vocabulary(tokenizer).special` says which they are.
    """
    return list(vocabulary(tokenizer).pieces)


def characters(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Return how many characters of a text begin in each token, `(size,)`; none in special tokens.

    Args:
        tokenizer: The tokenizer.
        size: Rows of the model's table, as many as there are tokens or more.
    """
    known, found = vocabulary(tokenizer), torch.zeros(size, dtype=torch.long)
    for i, piece in enumerate(known.pieces[:size]):
        if piece is not None and i not in known.special:
            found[i] = sum(byte & 0xC0 != 0x80 for byte in piece)  # UTF-8: all but continuations
    return found


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return what the ids of a tokenizer stand for; computed once for each state of the tokenizer.

    Raises:
        PairError: If the tokenizer does not run on the `tokenizers` library.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise PairError(
            f"{type(tokenizer).__name__} is no fast tokenizer: the bytes of its tokens are unknown"
        )
    return _vocabulary(tokenizer, len(tokenizer))


def tokenizer_hashes(
    tokenizer: PreTrainedTokenizerBase, prefix: Sequence[bytes], suffix: Sequence[bytes]
) -> tuple[str, str]:
    """Hash a tokenizer, and its chat template with the tokens that it gives.

    Args:
        tokenizer: Tokenizer of a model, with its chat template if it has one.
        prefix: Bytes of each template token before the user's text.
        suffix: Bytes of each template token after it.
    """
    tokens = [[token.hex() for token in side] for side in (prefix, suffix)]
    return _backend_digest(tokenizer, len(tokenizer)), digest([tokenizer.chat_template, *tokens])


def digest(value: object) -> str:
    """Hash what JSON can hold: 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=8)
def _backend_digest(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    """Hash all that decides about tokens; `size` is part of the key because tokens can be added."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # every call of the tokenizer changes them
        backend.pop(name, None)
    return digest(backend)


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """`size` is part of the key because tokens can be added to a tokenizer."""
    backend = tokenizer.backend_tokenizer
    kinds = {kind for part in (backend.decoder, backend.pre_tokenizer) for kind in _kinds(part)}
    byte_level, marked = "ByteLevel" in kinds, bool({"Metaspace", "Replace"} & kinds)
    byte_pieces = "ByteFallback" in kinds or getattr(backend.model, "byte_fallback", False)
    readable = not {"WordPiece", "BPEDecoder", "CTC"} & kinds
    added = tokenizer.added_tokens_decoder
    tokens = backend.get_vocab()
    pieces: list[bytes | None] = [None] * (max(tokens.values(), default=-1) + 1)
    fallback = set()
    for i, token in added.items():
        plain = token.content if token.special or not marked else token.content.replace(SPACE, " ")
        pieces[i] = plain.encode()
        tokens.pop(token.content, None)
    if byte_level and tokens:
        for i, raw in zip(tokens.values(), _from_byte_level(tokens), strict=True):
            pieces[i] = raw
        tokens = {}
    for word, i in tokens.items():
        if byte_pieces and (match := _BYTE_PIECE.fullmatch(word)):
            pieces[i] = bytes.fromhex(match[1])
            fallback.add(i)
        elif readable:
            pieces[i] = (word.replace(SPACE, " ") if marked else word).encode()
    special = frozenset(i for i, token in added.items() if token.special)
    return Vocabulary(tuple(pieces), special, frozenset(fallback))


def _kinds(part: Decoder | PreTokenizer | None) -> Iterator[str]:
    """Yield the names of the steps of a decoder or pre-tokenizer."""
    if part is None:
        return
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        yield step["type"]
        waiting += [*step.get("decoders", []), *step.get("pretokenizers", [])]


def _from_byte_level(tokens: Iterable[str]) -> list[bytes | None]:
    """Turn the stand-ins back into bytes, all tokens in one translation."""
    translated = _BETWEEN.join(tokens).translate(_BYTE_LEVEL).split(_BETWEEN)
    known = (token.isascii() or max(token) < "\u0100" for token in translated)
    return [t.encode("latin-1") if ok else None for t, ok in zip(translated, known, strict=True)]


def _by_bytes(known: Vocabulary) -> dict[Key, int]:
    """Index ids by their bytes; of equal bytes pieces go first, then smaller ids."""
    index: dict[Key, int] = {}
    ordinary = (i for i in range(len(known.pieces)) if i not in known.fallback)
    for i in (*ordinary, *sorted(known.fallback)):
        piece = known.pieces[i]
        if piece is None:
            continue
        key: Key = (piece,) if i in known.special else piece
        copies = 1
        while key in index:
            copies += 1
            key = (piece, i in known.special, copies)
        index[key] = i
    return index
