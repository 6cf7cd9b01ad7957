import dataclasses

import pytest
import torch
from accelerate import dispatch_model

from mechdiff.errors import PairError
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.pairs import loading, placement
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.spec import ModelId, ModelSpec
from tests.models import ARCHITECTURES, tiny_model, tokens
from tests.workspace import save_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("cards", [2, 3])
def test_every_weight_has_one_place_and_blocks_are_shared_out(arch, cards):
    model = tiny_model(arch)
    devices = [f"cuda:{2 + card}" for card in range(cards)]
    places = placement.split(model, devices)
    homes = {
        name: {place for part, place in places.items() if name.startswith(f"{part}.")}
        for name, _ in model.named_parameters()
    }
    assert all(len(found) == 1 for found in homes.values()), homes
    blocks = [place for part, place in places.items() if part.rpartition(".")[2].isdigit()]
    assert blocks == sorted(blocks)
    counts = [blocks.count(device) for device in devices]
    assert sum(counts) == 4
    assert max(counts) - min(counts) <= 1
    by_parameter: dict[int, set] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = next(place for part, place in places.items() if name.startswith(f"{part}."))
        by_parameter.setdefault(id(parameter), set()).add(home)
    assert all(len(found) == 1 for found in by_parameter.values())  # a tied head is with its embedding


def test_where_a_model_goes(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base")
    assert placement.placement(folder, torch.device("cpu")) is None
    with pytest.raises(PairError, match=r"cards is 2 on cpu; allowed: 1, or GPUs \(key: pair.cards\)"):
        placement.placement(folder, torch.device("cpu"), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert placement.placement(folder, torch.device("cuda", 3)) == {"": "cuda:3"}
    assert placement.placement(folder, torch.device("cuda", 2), 2)["model.layers.3"] == "cuda:3"
    with pytest.raises(PairError, match=r"cards is 2 from GPU 3; allowed: up to 1, 4 are there"):
        placement.placement(folder, torch.device("cuda", 3), 2)


def test_a_map_reaches_the_reader_and_the_weights_are_the_same(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base")
    spec = ModelSpec(ModelId(str(folder)))
    plain = load_model(spec)
    asked = []

    def on_cpu(where, device, cards):
        asked.append((where, device, cards))
        return dict.fromkeys(placement.split(plain.model, ["cpu", "cpu"]), "cpu")

    monkeypatch.setattr(loading, "placement", on_cpu)
    mapped = load_model(spec, device="cpu", cards=2)
    assert asked == [(folder, torch.device("cpu"), 2)]
    assert not mapped.spread
    assert mapped.fingerprint == plain.fingerprint
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, mapped.model.state_dict()[name]), name


def test_states_are_read_from_a_dispatched_model():
    model, ids = tiny_model(), tokens(2, 7)
    sites = [Site(0), Site(2, "head_z")]
    with record(model, sites) as clean, stop_after(model, 2):
        model(input_ids=ids, use_cache=False)
    clean = dict(clean)
    places = placement.split(model, ["cpu", "cpu"])
    dispatched = dispatch_model(model, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(dispatched, "_hf_hook")
    with record(dispatched, sites) as seen, stop_after(dispatched, 2):
        assert dispatched(input_ids=ids, use_cache=False) is None
    for site in sites:
        assert torch.equal(seen[site], clean[site])


def test_a_model_on_several_devices_says_so(tmp_path):
    loaded = load_model(ModelSpec(ModelId(str(save_model(tmp_path / "base")))))
    assert not loaded.spread
    loaded.model.hf_device_map = {"model.layers.0": "cuda:0", "model.layers.1": "cuda:1"}
    assert dataclasses.replace(loaded).spread
