import copy
import unicodedata
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mechdiff.errors import PromptError
from mechdiff.pairs.alignment import (
    DATE,
    OTHER,
    PREFIX,
    SUFFIX,
    USER,
    EncodedPrompt,
    align,
    collate,
    common_template,
    encode,
    render,
    template_tokens,
)
from mechdiff.pairs.tokenizers import token_bytes
from tests.pairs.vocabularies import PLAIN, TRIMMED, law, messages, permuted, rebuilt, small_tokenizer, wrap

KAZAKH = "Қонаққа қалай құрмет көрсетеді?"


def with_template(tokenizer, template):
    clone = copy.deepcopy(tokenizer)
    clone.chat_template = template
    return clone


def normalised(normalizer, source):
    clone = copy.deepcopy(source)
    clone.backend_tokenizer.normalizer = normalizer
    return clone


def joined(tok_a, tok_b, text):
    """Both encodings and their alignment."""
    (prefix_a, suffix_a), (prefix_b, suffix_b) = template_tokens(tok_a), template_tokens(tok_b)
    a, b = encode(tok_a, text), encode(tok_b, text)
    return a, b, align(a, b, *common_template(prefix_a, prefix_b, suffix_a, suffix_b))


def read_so_far(tokenizer, prompt, position, start=0):
    """The bytes of the tokens from a start up to a position."""
    pieces = token_bytes(tokenizer)
    return b"".join(pieces[i] for i in prompt.input_ids[start : position + 1])


@pytest.mark.parametrize("name", ["small", "smol"])
@pytest.mark.parametrize("template", [None, TRIMMED, PLAIN])
def test_equal_tokenizers_and_templates_align_everywhere(name, template, request):
    tokenizer = with_template(request.getfixturevalue(name), template)
    twin = copy.copy(tokenizer)

    @law
    @given(messages)
    def check(text):
        a, b, found = joined(tokenizer, twin, text)
        assert a == b
        named = [i for i, region in enumerate(a.regions) if region != OTHER]
        assert found.positions_a.tolist() == found.positions_b.tolist() == named
        assert sum(found.missed_a.values()) == found.missed_a["other"] == len(a) - len(named)
        if name == "small":  # every byte is a token, and control tokens merge with nothing
            assert OTHER not in a.regions

    check()


def test_ids_play_no_part(small):
    tokenizer = with_template(small, TRIMMED)
    shuffled, new = permuted(tokenizer)
    a, b, found = joined(tokenizer, shuffled, KAZAKH)
    assert b.input_ids == [new[i] for i in a.input_ids]
    assert torch.equal(found.positions_a, torch.arange(len(a)))
    assert torch.equal(found.positions_b, found.positions_a)


@pytest.mark.parametrize("templates", [(PLAIN, PLAIN), (TRIMMED, PLAIN), (None, PLAIN), (TRIMMED, None)])
def test_aligned_tokens_end_at_the_same_byte(smol, extended, templates):
    tokenizers = [with_template(t, template) for t, template in zip((smol, extended), templates, strict=True)]
    single = {piece[0] for piece in token_bytes(smol) if len(piece) == 1}

    @law
    @given(messages.map(lambda text: f"{text} {KAZAKH}"))
    def check(text):
        assume(single >= set(text.encode()))
        a, b, found = joined(*tokenizers, text)
        assert a.user_bytes == b.user_bytes == len(text.encode())
        users = found.regions == USER
        assert users.any()
        trimmed = len(text.encode()) - len(text.lstrip().encode())
        for tokenizer, prompt, positions in zip(tokenizers, (a, b), found[:2], strict=True):
            assert (positions.diff() > 0).all()
            for at, offset in zip(positions[users].tolist(), found.offsets[users].tolist(), strict=True):
                assert read_so_far(tokenizer, prompt, at).endswith(text.encode()[trimmed:offset])
        assert len(a) - sum(found.missed_a.values()) == len(b) - sum(found.missed_b.values()) == len(users)

    check()


def user_ends(prompt):
    return [offset for offset, region in zip(prompt.offsets, prompt.regions, strict=True) if region == USER]


def test_user_offsets_are_the_bytes_where_tokens_end(smol):
    prompt = encode(smol, KAZAKH)
    lengths = map(len, map(token_bytes(smol).__getitem__, smol(KAZAKH)["input_ids"]))
    assert user_ends(prompt) == list(accumulate(lengths))
    assert prompt.user_bytes == len(KAZAKH.encode())


def test_two_tokens_of_one_letter_have_two_offsets(smol):
    assert len(smol("қ", add_special_tokens=False)["input_ids"]) == 2
    assert set(smol("қ", return_offsets_mapping=True)["offset_mapping"]) == {(0, 1)}
    prompt = encode(smol, "қ")
    assert user_ends(prompt) == [1, 2]


def test_the_vocabularies_and_templates_of_a_real_pair(llama_pair):
    """A system block and a trimmed message on one side; a stray space and 31,510 more tokens on the other."""
    base, tuned = llama_pair
    (prefix_a, suffix_a), (prefix_b, suffix_b) = template_tokens(base), template_tokens(tuned)
    assert common_template(prefix_a, prefix_b, suffix_a, suffix_b) == (1, 5)
    assert suffix_a == [b"<|eot_id|>", b"<|start_header_id|>", b"assistant", b"<|end_header_id|>", b"\n\n"]
    a, b, found = joined(base, tuned, f"  {KAZAKH} hi\n")
    words = [o for o, r in zip(found.offsets.tolist(), found.regions.tolist(), strict=True) if r == USER]
    assert words[-1] == 2 + len(f"{KAZAKH} hi".encode())
    assert len(" қалай".encode()) + len(f"  {KAZAKH.split()[0]}".encode()) in words
    assert (found.regions == PREFIX).sum() == 1
    assert (found.regions == SUFFIX).sum() == 5
    assert (found.positions_a[-1], found.positions_b[-1]) == (len(a) - 1, len(b) - 1)
    assert found.offsets[-1] == -1
    assert found.missed_a["prefix"] == len(prefix_a) - 1
    assert found.missed_b["prefix"] == len(prefix_b) - 1
    assert found.missed_b["user"] >= 1  # the blanks that the other template trims


@pytest.mark.parametrize("template", [None, TRIMMED, PLAIN])
def test_a_text_begins_once(template, small, llama_pair):
    for source in (small, llama_pair[0]):
        tokenizer = with_template(source, template)
        prompt = encode(tokenizer, "hi there")
        assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
        assert prompt.input_ids[0] == tokenizer.bos_token_id
        assert (prompt.regions[0], prompt.offsets[0]) == (PREFIX, 0)


def test_an_end_of_text_that_the_tokenizer_adds_is_left_out(small):
    tokenizer = copy.deepcopy(small)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|eot_id|>", special_tokens=[("<s>", 0), ("<|eot_id|>", 3)]
    )
    assert tokenizer("hi")["input_ids"][-1] == 3
    assert encode(tokenizer, "hi") == encode(small, "hi")


def test_without_a_template_the_text_is_all_there_is(small):
    assert render(small, " hi\n") == " hi\n"
    prompt = encode(small, " hi\n")
    assert set(prompt.regions[1:]) == {USER}
    assert prompt.offsets[-1] == prompt.user_bytes == 4
    assert template_tokens(small) == ([b"<s>"], [])


@pytest.mark.parametrize("text", ["hi", "Knowledge ends: hi", "user", "Today"])
def test_a_text_that_also_stands_in_the_system_block(text, small):
    tokenizer = with_template(small, TRIMMED)
    assert render(tokenizer, text).count(text) > 1
    prompt = encode(tokenizer, text)
    first = prompt.regions.index(USER)
    last = first + prompt.regions.count(USER) - 1
    assert read_so_far(tokenizer, prompt, last, first) == text.encode()
    assert prompt.regions[last + 1 :] == [SUFFIX] * (len(prompt) - last - 1)


def test_a_template_that_depends_on_the_message_is_searched_from_the_end(small):
    template = "{% set m = messages[0]['content'] %}{{ m|length }}: hello {{ m }}<|eot_id|>"
    prompt = encode(with_template(small, template), "hello")
    first, last = prompt.regions.index(USER), len(prompt) - 2
    assert read_so_far(small, prompt, last) == b"5: hello hello"
    assert read_so_far(small, prompt, last, first).strip() == b"hello"
    assert (prompt.regions[-1], prompt.offsets[-2:]) == (SUFFIX, [5, -1])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] | upper }}", "changes the message"),
        ("nothing of it", "does not contain"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ 1 + 'a' }}", "fails on"),
        ("{% broken", "fails on"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, reason, small):
    with pytest.raises(PromptError, match=reason) as caught:
        encode(with_template(small, template), "hi there")
    assert "\n" not in str(caught.value)
    assert "pair.prompts" in str(caught.value)


def test_a_broken_character_is_one_line(small):
    with pytest.raises(PromptError, match="not valid Unicode") as caught:
        encode(small, "hi \ud800")
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_token_that_merges_text_and_template_has_no_name(small):
    def merge(state):
        state["model"]["vocab"]["?Ċ"] = len(small)
        state["model"]["merges"].insert(0, ["?", "Ċ"])
        state["pre_tokenizer"]["use_regex"] = False

    tokenizer = with_template(rebuilt(small, merge), "{{ messages[0]['content'] }}\nAnswer:")
    usual, merged = encode(tokenizer, "hi there"), encode(tokenizer, "hi there?")
    assert OTHER not in usual.regions
    assert merged.regions.count(OTHER) == 1
    assert merged.regions.index(OTHER) == merged.regions.index(SUFFIX) - 1
    assert merged.regions.count(SUFFIX) == usual.regions.count(SUFFIX) - 1
    suffix = template_tokens(tokenizer)[1]
    assert b"".join(suffix) == b"\nAnswer:"
    found = align(usual, merged, 0, len(suffix))
    assert (found.missed_a["suffix"], found.missed_b["other"]) == (1, 1)


def test_template_tokens_that_are_not_the_usual_ones_have_no_name(small):
    """The text takes half of a template token; the other half is then another token."""

    def merge(state):
        state["model"]["vocab"] |= {"?Ċ": len(small), "ĊĊ": len(small) + 1}
        state["model"]["merges"] = [["?", "Ċ"], ["Ċ", "Ċ"], *state["model"]["merges"]]
        state["pre_tokenizer"]["use_regex"] = False

    tokenizer = with_template(rebuilt(small, merge), "{{ messages[0]['content'] }}\n\nAnswer:")
    assert template_tokens(tokenizer)[1][0] == b"\n\n"
    prompt = encode(tokenizer, "hi there?")
    nameless = [i for i, r in zip(prompt.input_ids, prompt.regions, strict=True) if r == OTHER]
    assert [token_bytes(tokenizer)[i] for i in nameless] == [b"?\n", b"\n"]


def test_a_template_given_later_is_seen():
    tokenizer = small_tokenizer(300)
    assert template_tokens(tokenizer)[1] == []
    tokenizer.chat_template = PLAIN
    assert template_tokens(tokenizer)[1][0] == b"<|eot_id|>"
    assert encode(tokenizer, "hi").regions[-1] == SUFFIX


def test_no_prompt_depends_on_the_day(small):
    assert f"Today: {DATE}" in render(with_template(small, TRIMMED), "hi")


def test_a_template_token_of_unknown_bytes_ends_what_can_be_compared():
    words = {word: i for i, word in enumerate(["[U]", "[C]", "ask", "hi", "go"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[U]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    backend.add_special_tokens(["[U]", "[C]"])
    tokenizer = wrap(backend, chat_template="[C] ask {{ messages[0]['content'] }} go [C]")
    assert template_tokens(tokenizer) == ([b"[C]"], [b"[C]"])
    prompt = encode(tokenizer, "hi")
    assert prompt.regions == [PREFIX, PREFIX, USER, SUFFIX, SUFFIX]
    assert prompt.offsets == [0, 1, 2, -2, -1]


def test_letters_that_the_tokenizer_composes(small):
    """The tokens spell another text than the one given; an end is named only where it is known exactly."""
    composing = normalised(normalizers.NFC(), small)
    text = unicodedata.normalize("NFD", "жай тілі ё é hi")
    a, b, found = joined(small, composing, text)
    users = found.regions == USER
    for at, offset in zip(found.positions_b[users].tolist(), found.offsets[users].tolist(), strict=True):
        read = text.encode()[:offset].decode()
        assert read_so_far(composing, b, at, 1).decode() == unicodedata.normalize("NFC", read)
    assert text.encode().index(b" ") not in found.offsets[users]  # ends in a letter that was composed
    assert found.offsets[users][-1] == a.user_bytes == b.user_bytes == len(text.encode())
    assert found.missed_b["other"] > 0
    assert encode(composing, "hi there") == encode(small, "hi there")


def test_a_space_that_the_tokenizer_puts_before_the_text(small):
    spaced = normalised(normalizers.Prepend(" "), small)
    _, b, found = joined(small, spaced, "hi there")
    assert found.offsets[found.regions == USER].tolist()[-1] == 8
    assert max(b.offsets) == 8


def test_a_character_without_a_token_does_not_shift_the_others(smol):
    """SmolLM2 has no token for byte F1, which begins this character, and drops it."""
    prompt = encode(smol, "hi \U00040000 there")
    assert prompt.offsets[prompt.regions.index(SUFFIX) - 1] == prompt.user_bytes == 13
    ends = user_ends(prompt)
    assert ends == sorted(set(ends))
    assert {2, 7, 13} <= set(ends)


def test_collate_pads_on_the_right(small):
    prompts = [encode(small, text) for text in ("hi", "How do I greet an elder?")]
    for pad_id, filled in ((7, 7), (0, 0), (None, 0)):
        ids, mask = collate(prompts, pad_id)
        assert ids.dtype == mask.dtype == torch.long
        assert ids.shape == mask.shape == (2, len(prompts[1]))
        for row, seen, prompt in zip(ids, mask, prompts, strict=True):
            assert row[: len(prompt)].tolist() == prompt.input_ids
            assert set(row[len(prompt) :].tolist()) <= {filled}
            assert seen.tolist() == [1] * len(prompt) + [0] * (len(row) - len(prompt))


def test_nothing_in_common_gives_empty_tensors():
    a = EncodedPrompt([1, 2], [PREFIX, SUFFIX], [0, -1], 3)
    found = align(a, a, 0, 0)
    assert [t.shape for t in found[:4]] == [(0,)] * 4
    assert found.missed_a == {"prefix": 1, "user": 0, "suffix": 1, "other": 0}


def test_common_template_compares_bytes_from_both_ends():
    assert common_template([b"a", b"b"], [b"a", b"c"], [b"x", b"y", b"z"], [b"y", b"z"]) == (1, 2)
    assert common_template([], [b"a"], [], []) == (0, 0)
