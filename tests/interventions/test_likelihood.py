import pytest
import torch

from mechdiff.interventions.likelihood import Reader, continuation_logprobs, many_logprobs
from mechdiff.interventions.suffix import SuffixEngine
from tests.models import ARCHITECTURES, VOCAB, tiny_model

CONTEXT = [5, 9, 11, 7, 30, 22]
TEXTS = [[4], [8], [4, 6, 7, 9], [4, 6, 7, 2], [12, 13], [4]]
ALLOWED = torch.tensor([i for i in range(VOCAB) if i % 6 != 2])  # neither 2 nor 8


def plainly(model, context, text, allowed=None):
    logits = model(torch.tensor([[*context, *text]]), use_cache=False).logits[0, len(context) - 1 : -1]
    if allowed is None:
        return float(logits.log_softmax(-1)[range(len(text)), text].sum())
    place = {i: column for column, i in enumerate(allowed.tolist())}
    if any(i not in place for i in text):
        return float("-inf")
    return float(logits[:, allowed].log_softmax(-1)[range(len(text)), [place[i] for i in text]].sum())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [512, 4])
def test_scores_are_those_of_the_whole_text(arch, size):
    model = tiny_model(arch)
    reader = Reader(SuffixEngine(model))
    contexts = [CONTEXT, [*CONTEXT, 3], [*CONTEXT[:4], 8, 9, 10], CONTEXT[:5], [40], CONTEXT]
    for context in contexts:  # each begins like the one before, or does not
        found = continuation_logprobs(reader, context, TEXTS, ALLOWED, tokens_per_batch=size)
        for row, text in enumerate(TEXTS):
            assert found.free[row].item() == pytest.approx(plainly(model, context, text), abs=2e-5)
            expected = plainly(model, context, text, ALLOWED)
            assert found.within[row].item() == pytest.approx(expected, abs=2e-5)
        following = model(torch.tensor([context]), use_cache=False).logits[0, -1]
        assert torch.allclose(found.next_logits, following, atol=2e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [512, 9])
def test_contexts_run_together_are_scored_as_alone(arch, size):
    reader = Reader(SuffixEngine(tiny_model(arch)))
    contexts = [CONTEXT, [40], [*CONTEXT, 3, 4, 5], CONTEXT[2:], [9]]
    asked = [(context, TEXTS[n:]) for n, context in enumerate(contexts)]
    together = many_logprobs(reader, asked, ALLOWED, tokens_per_batch=size)
    for one, (context, texts) in zip(together, asked, strict=True):
        alone = continuation_logprobs(reader, context, texts, ALLOWED)
        assert torch.allclose(one.free, alone.free, atol=2e-5, rtol=0)
        assert torch.equal(one.within.isinf(), alone.within.isinf())
        known = ~alone.within.isinf()
        assert torch.allclose(one.within[known], alone.within[known], atol=2e-5, rtol=0)
        assert torch.allclose(one.next_logits, alone.next_logits, atol=2e-5)
    assert many_logprobs(reader, asked[:2])[1].within is None
    assert many_logprobs(reader, []) == []


def test_a_set_of_all_tokens_changes_nothing():
    reader = Reader(SuffixEngine(tiny_model()))
    found = continuation_logprobs(reader, CONTEXT, TEXTS, torch.arange(VOCAB))
    assert torch.equal(found.free, found.within)
    assert continuation_logprobs(reader, CONTEXT, TEXTS).within is None


def test_reading_a_longer_context_leaves_the_cache_given_out_before_as_it_was():
    reader = Reader(SuffixEngine(tiny_model()))
    first = reader.read(CONTEXT)
    keys = first.layers[0].keys.clone()
    reader.read([*CONTEXT, 3, 4])
    assert torch.equal(first.layers[0].keys, keys)
    assert reader.read([]) is None
