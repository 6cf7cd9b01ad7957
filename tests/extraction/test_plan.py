import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechdiff.data.store import SUFFIX, USER
from mechdiff.errors import PromptError
from mechdiff.extraction.plan import Plan, PlannedBatches, deal, encode_prompts
from mechdiff.pairs.alignment import EncodedPrompt
from tests.toys import loaded, prompts


def fake(user: int, suffix: int = 2) -> EncodedPrompt:
    ids = list(range(1, 2 + user + suffix))
    offsets = [0, *range(1, user + 1), *range(-suffix, 0)]
    return EncodedPrompt(ids, [0] + [USER] * user + [SUFFIX] * suffix, offsets, user)


def rows_in_order(plan: Plan) -> list[tuple[int, int]]:
    batches = PlannedBatches(plan, plan.shards, None)
    return [(int(e), int(p)) for b in batches for e, p in zip(b.rows.example, b.rows.position, strict=True)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120), st.integers(1, 5))
def test_every_row_is_planned_once_within_the_budget(lengths, budget, per_shard):
    encoded = [fake(n) for n in lengths]
    plan = Plan(encoded, "all", budget, per_shard)
    batches = list(PlannedBatches(plan, plan.shards, None))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.input_ids) == 1
    for shard in plan.shards:
        starts = [b.start for b in batches if b.shard == shard.index]
        sizes = [len(b.where) for b in batches if b.shard == shard.index]
        assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
        assert shard.rows == sum(sizes)
    expected = {(e, p) for e, n in enumerate(lengths) for p in range(1, n + 3)}
    found = rows_in_order(plan)
    assert set(found) == expected
    assert len(found) == len(expected)
    # neither the budget nor the size of the shards moves a row
    assert found == rows_in_order(Plan(encoded, "all", 10_000, 100))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 5))
def test_shards_are_dealt_by_tokens(lengths, per_shard, processes):
    plan = Plan([fake(n) for n in lengths], "all", 60, per_shard)
    hands = deal(plan.shards, processes)
    assert sorted(shard.index for hand in hands for shard in hand) == [s.index for s in plan.shards]
    assert all([s.index for s in hand] == sorted(s.index for s in hand) for hand in hands)
    loads = [sum(shard.padded for shard in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(shard.padded for shard in plan.shards)
    assert sum(shard.tokens for shard in plan.shards) == sum(n + 3 - plan.fixed for n in lengths)
    batches = [plan.batch(shard, i, 0) for shard in plan.shards for i in range(len(shard.batches))]
    assert sum(loads) == sum(batch.input_ids[:, plan.fixed :].numel() for batch in batches)


@pytest.mark.parametrize(
    ("positions", "kept"), [("all", [1, 2, 3, 4, 5]), ("user", [1, 2, 3]), ("last", [5])]
)
def test_positions(positions, kept):
    assert Plan([fake(3)], positions, 100, 1).kept == [kept]


def test_last_without_a_template_is_the_end_of_the_text():
    assert Plan([fake(3, suffix=0)], "last", 100, 1).kept == [[3]]


def test_a_batch_points_at_its_rows():
    plan = Plan([fake(3), fake(5)], "user", 100, 1)
    batch = plan.batch(plan.shards[0], 0, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 9, 9], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.where.tolist() == [[0, 1], [0, 2], [0, 3], *([1, t] for t in range(1, 6))]
    assert batch.rows.offset.tolist() == [1, 2, 3, 1, 2, 3, 4, 5]
    assert torch.equal(batch.rows.position, batch.where[:, 1])


def test_text_longer_than_the_context():
    model, texts = loaded(), prompts()
    longest = max(len(e) for e in encode_prompts(model.tokenizer, texts, None))
    assert len(encode_prompts(model.tokenizer, texts, longest)) == len(texts)
    with pytest.raises(
        PromptError, match=rf"^prompt '.*' has {longest} tokens; allowed: up to {longest - 1}, .*pair.prompts"
    ):
        encode_prompts(model.tokenizer, texts, longest - 1)


def test_no_prompts():
    with pytest.raises(PromptError, match=r"at least one is needed \(key: pair.prompts\)"):
        encode_prompts(loaded().tokenizer, [], None)
