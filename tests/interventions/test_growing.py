"""Keys and values that grow in place are those of the library's own layer."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mechdiff.interventions.growing import ROOM, GrowingLayer, growing


def states(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, length, 4, generator=draws)
    return keys, values


def layer(rows: int, length: int) -> DynamicLayer:
    made = DynamicLayer()
    made.update(*states(rows, length, 0))
    return made


def test_tokens_are_written_behind_what_is_held_also_when_rows_leave():
    theirs = layer(3, 5)
    held = theirs.keys
    ours = GrowingLayer(theirs.keys, theirs.values)
    before = held.clone()
    for step in range(2 * ROOM):
        rows = 3 if step < ROOM // 2 else 2
        if step == ROOM // 2:
            for one in (theirs, ours):
                one.batch_select_indices(torch.tensor([2, 0]))
        new = states(rows, 1 + step % 2, step + 1)
        for mine, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(held, before), "what it was made from stays as it is"


def test_two_that_begin_alike_do_not_share_their_room():
    begun = layer(2, 3)
    both = [GrowingLayer(begun.keys, begun.values) for _ in range(2)]
    kept = [one.update(*states(2, 1, seed))[0] for seed, one in enumerate(both)]
    assert not torch.equal(kept[0][:, :, -1], kept[1][:, :, -1])
    assert torch.equal(kept[0][:, :, :-1], kept[1][:, :, :-1])


def test_a_layer_that_keeps_a_window_stays_as_it_is():
    cache = DynamicCache()
    window = DynamicSlidingWindowLayer(sliding_window=4)
    cache.layers = [layer(1, 3), window]
    assert [type(part) for part in growing(cache).layers] == [GrowingLayer, DynamicSlidingWindowLayer]
    assert cache.layers[1] is window
