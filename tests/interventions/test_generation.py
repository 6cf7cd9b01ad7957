import pytest
import torch

from mechdiff.errors import ActivationError
from mechdiff.interventions.generation import generate, stop_tokens
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.sites import Site
from tests.models import ARCHITECTURES, tiny_model, tokens

PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 1, 6, 9)]


def step_by_step(model, prompt, count, stops=(), allowed=None):
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if allowed is not None:
            kept = torch.full_like(logits, float("-inf"))
            kept[allowed] = logits[allowed]
            logits = kept
        token = int(logits.argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batches_say_what_each_prompt_alone_would(arch):
    model = tiny_model(arch)
    expected = [step_by_step(model, p, 8) for p in PROMPTS]
    assert generate(model, PROMPTS, 8, rows_per_batch=5) == expected
    assert generate(model, PROMPTS, 8, rows_per_batch=2) == expected


def test_answers_end_before_a_stop_token_wherever_their_batch_goes_on():
    model = tiny_model(seed=3)
    free = [step_by_step(model, p, 12) for p in PROMPTS]
    stops = {free[0][2], free[1][0], free[2][5]}
    found = generate(model, PROMPTS, 12, stops)
    assert found == [step_by_step(model, p, 12, stops) for p in PROMPTS]
    assert len({len(answer) for answer in found}) > 2


def test_only_allowed_tokens_are_said():
    model, allowed = tiny_model(), torch.arange(5, 30)
    found = generate(model, PROMPTS, 6, allowed_ids=allowed)
    assert found == [step_by_step(model, p, 6, allowed=allowed) for p in PROMPTS]
    assert {t for answer in found for t in answer} <= set(range(5, 30))
    assert generate(model, PROMPTS, 6, allowed_ids=torch.arange(61)) == generate(model, PROMPTS, 6)


def test_edits_see_the_same_positions_in_a_batch():
    model = tiny_model()
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edit = {Site(1): lambda h, positions: h + 3 * (positions >= 4)[..., None] * push}
    with intervene(model, edit):
        together = generate(model, PROMPTS, 6)
        alone = [generate(model, [p], 6)[0] for p in PROMPTS]
    assert together == alone
    assert together != generate(model, PROMPTS, 6)


def test_edges():
    model = tiny_model()
    assert generate(model, [], 4) == []
    assert generate(model, PROMPTS, 0) == [[] for _ in PROMPTS]
    model.lm_head.weight[7] = float("nan")
    with pytest.raises(ActivationError, match="non-finite"):
        generate(model, PROMPTS, 1)


def test_stop_tokens_come_from_everywhere():
    model = tiny_model()
    model.generation_config.eos_token_id = [9, 4]
    assert stop_tokens(model, 7) == [4, 7, 9]
    assert stop_tokens(model, None) == [4, 9]
