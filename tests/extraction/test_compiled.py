"""Extraction by compiled norms and MLPs: the same states but for rounding, and a store of its own."""

from functools import partial

import pytest
import torch

from mechdiff.errors import ConfigError
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.compiled import compiled
from tests.models import ARCHITECTURES, tiny_model, tokens
from tests.toys import loaded, prompts

SITES = ["resid_post.1", "mlp_out.0", "attn_out.1", "head_z.0"]


@pytest.fixture
def traced(monkeypatch):
    """Trace and guard as ever, but run what was traced without a C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_states_are_the_same_and_kept_apart(traced, tmp_path):
    model, texts = loaded(), prompts(1)
    plain, fast = (
        ensure_store(
            model,
            texts,
            SITES,
            ExtractionSpec(str(tmp_path), compile=own),
            trainer_kwargs={"enable_progress_bar": False},
        )
        for own in (False, True)
    )
    assert plain.folder != fast.folder
    assert plain.identity.model.rpartition("/")[2] == fast.identity.model.rpartition("/")[2]
    for site in SITES:
        assert (plain.read(site) - fast.read(site)).abs().max() < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_and_mlps_are_compiled_and_given_back(arch, traced):
    model, ids = tiny_model(arch, 2), tokens(2, 7)
    with torch.no_grad():
        wanted = model(ids).logits
        with compiled(model):
            own = [name for name, module in model.named_modules() if "forward" in vars(module)]
            assert (model(ids).logits - wanted).abs().max() < 1e-5
        assert torch.equal(model(ids).logits, wanted)
    assert len(own) >= 2 * 3 + 1, "two norms and an MLP in each block, and the last norm"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_over_several_cards_is_refused(tmp_path):
    model = loaded()
    model.model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ConfigError, match="compile is true for a model over several cards"):
        ensure_store(model, prompts(1), SITES, ExtractionSpec(str(tmp_path), compile=True))
    assert not list(tmp_path.iterdir())
