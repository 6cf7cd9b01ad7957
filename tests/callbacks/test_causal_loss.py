"""A subspace that is taught through the frozen model moves base's next token more than where it started."""

import pytest
import torch
import yaml

from mechdiff.callbacks import CausalLoss
from mechdiff.errors import ConfigError
from mechdiff.modules import SteeringSubspaceSGD
from tests.workspace import ROOT, run, save_model, save_prompts, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "base")
    save_model(folder / "tuned", noise=0.08)
    save_prompts(folder)
    return write_pair(folder)


def fit(pair, root, epochs, **model):
    body = yaml.safe_load((ROOT / "configs" / "steering_cultural.yaml").read_text(encoding="utf-8"))
    body["pair"], body["layers"] = str(pair), [2]
    settings = {"k": 1, "loss": "causal", "learning_rate": 0.05, "compare": [], "penalty": 0.1, **model}
    body["model"] = {"class_path": "mechdiff.modules.SteeringSubspaceSGD", "init_args": settings}
    body["data"]["init_args"]["batch_size"] = 16
    body["trainer"] |= {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
    body["trainer"]["logger"]["init_args"]["save_dir"] = str(root / "runs")
    body["trainer"]["callbacks"] = [{"class_path": "mechdiff.callbacks.CausalLoss"}]
    body["extraction"]["root"] = str(root / "stores")
    (root / "config.yaml").write_text(yaml.safe_dump(body))
    return run("fit", "--config", root / "config.yaml")


def test_descent_through_the_model_lowers_the_divergence_on_unseen_prompts(pair, tmp_path, monkeypatch):
    losses: list[float] = []
    logged = SteeringSubspaceSGD.log

    def log(self, name, value, **more):
        if name == "val/loss":
            losses.append(float(value))
        logged(self, name, value, **more)

    monkeypatch.setattr(SteeringSubspaceSGD, "log", log)
    for name, epochs, rate in (("still", 1, 0.0), ("moved", 8, 0.02)):
        (tmp_path / name).mkdir()
        assert fit(pair, tmp_path / name, epochs, learning_rate=rate, penalty=0.0) == 0
    still, *moved = losses
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.97 * still
    (path,) = (tmp_path / "moved").rglob("*.ckpt")
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert not any("embed" in name or "lm_head" in name for name in kept)
    basis, start = kept["basis_sgd"][0], kept["basis_paired_svd"][0]
    assert float((basis @ start.T).abs()) < 0.99
    assert float(basis.norm()) == pytest.approx(1, abs=1e-4)


def test_what_it_cannot_teach_is_named(pair, tmp_path, capsys):
    assert fit(pair, tmp_path, 1, positions=["last", "user"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        "mechdiff: positions are last, user with a causal loss; allowed: last (key: model.positions)"
    )
    with pytest.raises(ConfigError, match="max_prompts is 1; allowed: 2 or more"):
        CausalLoss(1)
