"""Every shipped configuration is parsed, and run on tiny models."""

from pathlib import Path

import pytest
import torch
import yaml

from mechdiff.pairs.spec import PairSpec
from tests.models import ARCHITECTURES
from tests.workspace import ROOT, everything, run, workspace

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
RUNS = [path.stem for path in SHIPPED if path.parent.name == "configs"]
LAYERS = "--layers=[1, 2]"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a pair file for each architecture."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pairs")
    return {arch: workspace(root / arch, arch) for arch in ARCHITECTURES}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trial(name: str, pair: Path, *more: object) -> int:
    options = ["--config", ROOT / "configs" / f"{name}.yaml", "--pair", pair, LAYERS]
    quick = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    verb = "test" if name.startswith(("rq1", "rq4")) else "fit"
    return run(verb, *options, *quick, "--trainer.accelerator=cpu", *more)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_runs(name: str, pairs: dict[str, Path], elsewhere: Path) -> None:
    assert trial(name, pairs["llama"]) == 0
    assert not everything(elsewhere)


@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
@pytest.mark.parametrize("name", ["clt_cultural", "steering_cultural"])
def test_a_run_runs_on_every_architecture(name: str, arch: str, pairs: dict[str, Path]) -> None:
    assert trial(name, pairs[arch]) == 0


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name == "trainer"], ids=lambda p: p.stem)
def test_a_trainer_runs(path: Path, pairs: dict[str, Path]) -> None:
    assert trial("clt_cultural_sgd", pairs["llama"], f"--trainer={path}", "--trainer.accelerator=cpu") == 0


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("pair", [p for p in SHIPPED if p.parent.name == "pairs"], ids=lambda p: p.stem)
def test_a_pair_is_understood_by_every_run(name: str, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--config", ROOT / "configs" / f"{name}.yaml", "--pair", pair, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)["pair"]
    assert shown["name"] == pair.stem
    assert shown["tuned"]["id"]
    written = yaml.safe_load(pair.read_text(encoding="utf-8"))
    assert set(written) <= set(PairSpec.__dataclass_fields__)
    files = [*shown["prompts"], shown["openings"]]
    files += [adapter] if (adapter := shown["tuned"]["adapter"]) else []
    assert [path for path in files if not Path(path).exists()] == []
    if pair.stem.endswith("_smol"):
        assert shown["tuned"]["adapter"]
    else:
        assert shown["reference"]["id"] == "meta-llama/Llama-3.1-8B"


def test_every_run_names_itself_and_the_embedded_pair_by_default() -> None:
    for name in RUNS:
        body = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert body["trainer"]["logger"]["init_args"]["name"] == name
        assert (ROOT / "configs" / body["pair"]).is_file()


def test_prompts_of_a_third_language_are_found_from_the_file_that_names_them(
    pairs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs" / "steering_cultural.yaml"
    assert run("fit", "--config", config, "--pair", pairs["llama"], "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    (transfer,) = [c for c in shown if c["class_path"].endswith("Transfer")]
    assert transfer["init_args"]["extra_prompts"] == [str(ROOT / "data" / "prompts_freeform_ru.jsonl")]
