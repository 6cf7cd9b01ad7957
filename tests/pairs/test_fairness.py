from dataclasses import dataclass

import pytest
import torch

from mechdiff.errors import PairError, PromptError
from mechdiff.pairs.fairness import (
    coverage,
    filter_shared,
    lost_mass,
    mask_logits_to_allowed,
    restrict_logits,
    uses_only_shared,
)
from mechdiff.pairs.tokenizers import SharedVocab
from tests.pairs.vocabularies import permuted

ENGLISH, KAZAKH = "What is a greeting?", "Қонаққа қалай құрмет көрсетеді?"


@dataclass(frozen=True)
class Message:
    id: str
    text: str


PROMPTS = [Message("en", ENGLISH), Message("kk", KAZAKH), Message("kk2", "қалай құрмет")]


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def test_kl_is_the_sum_of_its_parts():
    p, q = 3 * logits(50, 200), 3 * logits(50, 200, seed=1)
    inside = torch.arange(0, 200, 3)
    outside = torch.tensor([i for i in range(200) if i % 3])
    lost_p, lost_q = lost_mass(p, inside), lost_mass(q, inside)
    choice = [torch.stack([1 - lost, lost], -1).log() for lost in (lost_p, lost_q)]
    parts = (
        (1 - lost_p) * kl(restrict_logits(p, inside), restrict_logits(q, inside))
        + kl(*choice)
        + lost_p * kl(restrict_logits(p, outside), restrict_logits(q, outside))
    )
    torch.testing.assert_close(parts, kl(p.log_softmax(-1), q.log_softmax(-1)), atol=1e-13, rtol=1e-13)


def test_two_orders_of_ids_give_one_distribution(small):
    shuffled, new = permuted(small)
    shared = SharedVocab(small, shuffled)
    base = logits(2, 3, len(small))
    tuned = torch.empty_like(base)
    tuned[..., torch.tensor(new)] = base
    a, b = restrict_logits(base, shared.base_ids), restrict_logits(tuned, shared.tuned_ids)
    assert torch.equal(a, b)
    assert kl(a, b).abs().max() == 0


def test_restricted_probabilities_are_conditional_ones():
    x, ids = logits(4, 30), torch.tensor([7, 2, 29])
    conditional = x.softmax(-1)[:, ids] / x.softmax(-1)[:, ids].sum(-1, keepdim=True)
    torch.testing.assert_close(restrict_logits(x, ids).exp(), conditional, atol=1e-15, rtol=1e-13)


def test_filling_with_minus_infinity_makes_kl_nan():
    p, q, ids = logits(30), logits(30, seed=1), torch.arange(10)
    filled = [mask_logits_to_allowed(x, ids).log_softmax(-1) for x in (p, q)]
    assert kl(*filled).isnan()
    restricted = [restrict_logits(x, ids) for x in (p, q)]
    assert kl(*restricted).isfinite()
    torch.testing.assert_close(filled[0][:10], restricted[0])


@pytest.mark.parametrize("kind", [set, list, torch.tensor])
def test_masking_keeps_the_allowed_logits(kind):
    x = logits(2, 3, 12)
    masked = mask_logits_to_allowed(x, kind([1, 5]))
    assert torch.equal(masked[..., [1, 5]], x[..., [1, 5]])
    assert masked.isneginf().sum() == 2 * 3 * 10
    assert x.isfinite().all()


def test_lost_mass_is_what_the_shared_set_leaves_out():
    x, ids = logits(5, 40), torch.arange(25)
    torch.testing.assert_close(lost_mass(x, ids), x.softmax(-1)[:, 25:].sum(-1), atol=1e-15, rtol=1e-13)
    assert torch.equal(lost_mass(x, torch.arange(40)), torch.zeros(5, dtype=x.dtype))


def test_a_small_lost_mass_keeps_its_digits():
    x = torch.tensor([0.0, 0.0, -50.0])
    expected = torch.tensor(-50.0).exp() / 2
    torch.testing.assert_close(lost_mass(x, torch.tensor([0, 1])), expected, rtol=1e-5, atol=0)
    assert lost_mass(1000 * x, torch.tensor([2])) == 1.0


def test_padding_rows_count_as_lost(small):
    shared = SharedVocab(small, small)
    x = torch.zeros(len(small) + 100)
    torch.testing.assert_close(lost_mass(x, shared.base_ids), torch.tensor(100 / len(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_raised_before_the_sum(dtype):
    x = logits(3, 50, dtype=torch.float32).to(dtype)
    ids = torch.arange(20)
    assert restrict_logits(x, ids).dtype == lost_mass(x, ids).dtype == torch.float32
    torch.testing.assert_close(restrict_logits(x, ids), x.float()[:, :20].log_softmax(-1))


def test_coverage_of_both_tokenisations(smol, extended):
    shared = SharedVocab(smol, extended)
    for tokenizer in (smol, extended):
        assert coverage(ENGLISH, tokenizer, shared) == 1.0
        assert uses_only_shared(ENGLISH, tokenizer, shared)
    assert uses_only_shared(KAZAKH, smol, shared)
    assert not uses_only_shared(KAZAKH, extended, shared)
    ids = extended(KAZAKH)["input_ids"]
    assert coverage(KAZAKH, extended, shared) == pytest.approx(sum(i < len(smol) for i in ids) / len(ids))


def test_coverage_does_not_depend_on_the_order_of_the_pair(smol, extended):
    there, back = SharedVocab(smol, extended), SharedVocab(extended, smol)
    assert coverage(KAZAKH, extended, there) == coverage(KAZAKH, extended, back) < 1


def test_the_strict_filter_keeps_what_both_models_read_alike(smol, extended):
    shared = SharedVocab(smol, extended)
    kept, report = filter_shared(PROMPTS, smol, extended, shared)
    assert kept == PROMPTS[:1]
    assert (report.total, report.kept, report.min_shared_coverage) == (3, 1, 1.0)
    assert report.coverage["en"] == (1.0, 1.0)
    assert report.coverage["kk"] == (1.0, coverage(KAZAKH, extended, shared))


def test_a_lower_threshold_keeps_more(smol, extended):
    shared = SharedVocab(smol, extended)
    kept, _ = filter_shared(PROMPTS, smol, extended, shared, coverage(KAZAKH, extended, shared))
    assert [p.id for p in kept] == ["en", "kk"]
    assert filter_shared(PROMPTS, smol, extended, shared, 0.0)[0] == PROMPTS


def test_one_tokenizer_filters_nothing(smol):
    kept, report = filter_shared(PROMPTS, smol, smol, SharedVocab(smol, smol))
    assert kept == PROMPTS
    assert set(report.coverage.values()) == {(1.0, 1.0)}


def test_nothing_kept_names_the_key_and_the_best(smol, extended):
    shared = SharedVocab(smol, extended)
    best = f"{coverage(KAZAKH, extended, shared):.4f}"
    with pytest.raises(PromptError, match=r"pair\.min_shared_coverage is 1\.0") as caught:
        filter_shared(PROMPTS[1:], smol, extended, shared)
    assert best in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_refused(value, smol):
    with pytest.raises(PairError, match=r"pair\.min_shared_coverage is .*allowed: 0 to 1"):
        filter_shared(PROMPTS, smol, smol, SharedVocab(smol, smol), value)
