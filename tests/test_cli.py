"""The command line as a user meets it: one process, tiny models, nothing left where nothing was asked for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import mechdiff
from mechdiff.__main__ import VERBS
from mechdiff.__main__ import main as command
from mechdiff.cli import MechdiffCLI
from mechdiff.results import Results
from tests.reporting.events import check_layout, columns, read, started, states_of
from tests.workspace import ROOT, config, everything, run, save_model, small, workspace, write_pair

SITES = ["resid_post.1", "resid_post.2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real run."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fitted")
    assert run("fit", *config(), *small(place / "pair.yaml", root)) == 0
    (folder,) = (root / "runs" / "clt_cultural").iterdir()
    return folder


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["records"]


def printed_config(capsys: pytest.CaptureFixture[str], *args: object, verb: str = "fit") -> dict:
    assert run(verb, *args, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


# --- what is parsed --------------------------------------------------------------------------------------


def test_print_config_is_a_configuration(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    shown = printed_config(capsys, *config())
    assert shown["layers"] == [6, 12, 18, 24]
    assert shown["pair"]["name"] == "cultural_smol"
    assert all(Path(path).is_file() for path in shown["pair"]["prompts"])
    assert shown["model"]["class_path"] == "mechdiff.modules.CLTMap"
    (elsewhere / "again.yaml").write_text(yaml.safe_dump(shown))
    assert printed_config(capsys, "--config", "again.yaml") == shown


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_help_names_what_belongs_to_a_run(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    for option in (
        "--pair",
        "--layers",
        "--max_prompts",
        "--extraction.root",
        "--trainer.fast_dev_run",
        "--ckpt_path",
    ):
        assert option in shown
    assert shown.startswith("usage: ")
    assert len(shown.splitlines()[0]) < 100
    assert "--optimizer" not in shown


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--model.lambdas", "[0.1, 1]"], "model.init_args.lambdas", [0.1, 1.0]),
        (["--layers", "[0,1]"], "layers", [0, 1]),
        (["--layers", "fallback"], "layers", "fallback"),
        (["--layers", "attn_out.1"], "layers", "attn_out.1"),
        (["--layers=[attn_out.1, 3]"], "layers", ["attn_out.1", 3]),
        (["--pair.tuned.id=some/model"], "pair.tuned.id", "some/model"),
        (["--pair.tuned.adapter=null"], "pair.tuned.adapter", None),
        (["--data.val_frac=0.3"], "data.init_args.val_frac", 0.3),
        (["--trainer=" + str(ROOT / "configs/trainer/cpu.yaml")], "trainer.accelerator", "cpu"),
        (["--trainer=" + str(ROOT / "configs/trainer/cpu.yaml")], "trainer.max_epochs", 1),
        (["--model=CLTMapSGD"], "model.class_path", "mechdiff.modules.CLTMapSGD"),
    ],
    ids=lambda value: str(value).rpartition("/")[2],
)
def test_an_override_changes_one_thing(
    options: list[str], key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, shown = printed_config(capsys, *config()), printed_config(capsys, *config(), *options)

    def at(tree: dict, name: str) -> object:
        for part in name.split("."):
            tree = tree[part]
        return tree

    assert at(shown, key) == value
    assert {k: shown[k] for k in shown if k != key.split(".")[0]} == {
        k: plain[k] for k in plain if k != key.split(".")[0]
    }


def test_a_pair_file_replaces_the_pair_wholly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_config(capsys, *config())["pair"]["tuned"]["adapter"]
    write_pair(place, "bare.yaml", openings=None)
    pair = printed_config(capsys, *config(), "--pair", place / "bare.yaml")["pair"]
    assert pair["tuned"] == {"id": str(place / "tuned"), "revision": None, "adapter": None}
    assert (pair["openings"], pair["min_shared_coverage"], pair["benchmarks"]) == (None, 1.0, {})
    mixed = printed_config(capsys, *config(), "--pair", place / "bare.yaml", "--pair.tuned.id=x/y")["pair"]
    assert mixed == pair | {"tuned": pair["tuned"] | {"id": "x/y"}}


def test_configurations_are_layered(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "mine.yaml").write_text("layers: [3]\npair:\n  min_shared_coverage: 0.5\n")
    plain, shown = (
        printed_config(capsys, *config()),
        printed_config(capsys, *config(), "--config", "mine.yaml"),
    )
    assert shown["layers"] == [3]
    assert shown["pair"] == plain["pair"] | {"min_shared_coverage": 0.5}
    assert shown["trainer"] == plain["trainer"]


def test_paths_in_a_pair_file_are_relative_to_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = printed_config(capsys, *config(), "--pair", place / "pair.yaml")["pair"]
    assert pair["base"]["id"] == str(place / "base")
    assert pair["prompts"] == [str(place / f"{name}.jsonl") for name in ("fit", "dev", "eval")]
    assert pair["openings"] == str(place / "openings.jsonl")


# --- what a run leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [["--trainer.fast_dev_run=true"], ["--trainer.fast_dev_run=2"], ["--trainer.logger=false"]],
    ids=lambda options: options[0],
)
def test_a_trial_leaves_nothing_behind(
    options: list[str], place: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    stores = [] if "fast" in options[0] else [f"--extraction.root={tmp_path / 'stores'}"]
    before = everything(place)
    pair = ["--pair", place / "pair.yaml", "--layers=[1, 2]", "--data.tokens=null"]
    assert run("fit", *config(), *pair, *options, *stores) == 0
    assert not everything(elsewhere)
    assert not everything(scratch)
    assert everything(place) == before


def test_without_a_logger_results_go_where_the_user_says(
    place: Path, tmp_path: Path, elsewhere: Path
) -> None:
    options = [*small(place / "pair.yaml", tmp_path)[:-1], "--trainer.logger=false"]
    for _ in range(2):  # the second run writes over the first
        assert run("fit", *config(), *options, f"--trainer.default_root_dir={tmp_path / 'mine'}") == 0
        assert {"results.json", "config.yaml", "checkpoints/fitted.ckpt"} <= everything(tmp_path / "mine")
    assert not everything(elsewhere)


def test_what_a_run_leaves(fitted: Path) -> None:
    found = everything(fitted)
    assert {
        "config.yaml",
        "results.json",
        "items.parquet",
        "figures/clt_r2.png",
        "figures/patch_kl.png",
        "checkpoints/fitted.ckpt",
    } <= found
    assert [name for name in found if name.startswith("events.out.tfevents")]
    results = Results.read(fitted / "results.json")
    assert {r.site for r in results if r.quantity == "r2_delta"} == set(SITES)
    assert {"kl_raw", "kl_mapped", "kl_reduction", "patch_agreement"} <= {r.quantity for r in results}
    assert results.provenance["seed"] == 17
    assert results.provenance["pair"]["name"] == "tiny"
    items = pq.read_table(fitted / "items.parquet").to_pylist()
    assert {item["site"] for item in items} == set(SITES)
    assert not [path for path in found if path.endswith(".part")]


def test_tensorboard_has_hyperparameters_and_states_of_a_fit(fitted: Path) -> None:
    events = read(fitted)
    held = started(events)
    assert {k: held[k] for k in ("pair", "question", "sites", "solver", "seed")} == {
        "pair": "tiny",
        "question": "rq2",
        "sites": ", ".join(SITES),
        "solver": "ridge",
        "seed": 17,
    }
    assert set(columns(events)[0]) >= held.keys()
    titles = check_layout(events)
    assert any(
        "r2_delta" in title for title in titles["RQ2 by layer: R², how much of the difference a map explains"]
    )
    tables = states_of(fitted)
    assert set(tables) == set(SITES)
    assert all({row[1] for row in known} == {"target", "neutral"} for _, known in tables.values())


def test_records_are_read_as_they_were_written(fitted: Path, tmp_path: Path) -> None:
    again = Results.read(fitted / "results.json").write(tmp_path / "results.json")
    assert again.read_bytes() == (fitted / "results.json").read_bytes()


def test_a_saved_configuration_runs_again_with_the_same_records(
    fitted: Path, tmp_path: Path, elsewhere: Path
) -> None:
    saved = tmp_path / "config.yaml"
    shutil.copy(fitted / "config.yaml", saved)
    written = yaml.safe_load(saved.read_text())
    assert written["data"]["init_args"]["source"] == ""
    assert Path(written["extraction"]["root"]).is_absolute()
    assert run("fit", "--config", saved, f"--extraction.root={tmp_path / 'new'}") == 0
    again = sorted(fitted.parent.iterdir())[-1]
    assert again != fitted
    assert records(again) == records(fitted)  # to the last bit, from activations extracted anew
    assert not everything(elsewhere)


def test_relative_folders_are_saved_absolute(place: Path, elsewhere: Path) -> None:
    options = [*small(place / "pair.yaml", Path()), "--layers=[1]", "--trainer.callbacks=null"]
    assert run("fit", *config(), *options) == 0
    (folder,) = (elsewhere / "runs" / "clt_cultural").iterdir()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["extraction"]["root"] == str(elsewhere / "stores")
    assert written["trainer"]["logger"]["init_args"]["save_dir"] == str(elsewhere / "runs")


def test_evaluation_repeats_the_records_of_the_fit(
    fitted: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*config(), *small(place / "pair.yaml", fitted.parents[2])]
    options += ["--ckpt_path", fitted / "checkpoints" / "fitted.ckpt"]
    assert run("test", *options, "--model.lambdas=[0.5]") == 0
    again = sorted(fitted.parent.iterdir())[-1]
    assert again != fitted
    assert records(again) == records(fitted)
    assert re.search(
        r"warning: model.lambdas is \[0.5\], but .* in the checkpoint, which counts", capsys.readouterr().err
    )
    assert run("test", *options, "--trainer.fast_dev_run=true") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_checkpoint_is_not_tested_on_what_it_was_fitted_to(
    fitted: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*config(), *small(place / "pair.yaml", fitted.parents[2])]
    options += ["--ckpt_path", fitted / "checkpoints" / "fitted.ckpt"]
    assert run("test", *options, "--seed_everything=3") == 2
    assert "was fitted to another split of the prompts" in capsys.readouterr().err


def test_a_seed_rules_the_whole_run(fitted: Path, place: Path, tmp_path: Path) -> None:
    options = [*small(place / "pair.yaml", tmp_path), "--seed_everything=3", "--trainer.callbacks=null"]
    assert run("fit", *config(), *options, f"--extraction.root={fitted.parents[2] / 'stores'}") == 0
    (folder,) = (tmp_path / "runs" / "clt_cultural").iterdir()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["model"]["init_args"]["seed"] == written["data"]["init_args"]["seed"] == 3
    r2 = [{r["site"]: r["value"] for r in records(f) if r["quantity"] == "r2"} for f in (folder, fitted)]
    assert r2[0] != r2[1]


@pytest.mark.parametrize("site", ["attn_out.1", "head_out.1", "mlp_out.0"])
def test_other_sites_are_fitted(site: str, place: Path) -> None:
    options = ["--pair", place / "pair.yaml", f"--layers={site}", "--trainer.callbacks=null"]
    assert run("fit", *config(), *options, "--trainer.fast_dev_run=true") == 0


def test_fallback_scales_with_the_depth(place: Path) -> None:
    options = [*config(), "--pair", str(place / "pair.yaml"), "--layers=fallback"]
    cli = MechdiffCLI("fit", [*options, "--trainer.callbacks=null", "--trainer.fast_dev_run=true"])
    assert cli.cfg.model.init_args.sites == ["resid_post.3"]


def test_fewer_prompts_are_read(place: Path) -> None:
    options = [*config(), "--pair", str(place / "pair.yaml"), "--layers=[1]", "--trainer.callbacks=null"]
    cli = MechdiffCLI("fit", [*options, "--max_prompts=1", "--trainer.fast_dev_run=true"])
    kinds = [(p.split, p.lang, p.label) for p in cli.prompts]
    assert len(kinds) == len(set(kinds)) > 1


# --- the mechdiff command --------------------------------------------------------------------------------


def test_extract_fills_the_stores_and_stops(
    fitted: Path, place: Path, tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*config(), *small(place / "pair.yaml", tmp_path)]
    assert command(["extract", *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["source", "target"]
    assert "resid_post.1, resid_post.2" in shown[0]
    stores = fitted.parents[2] / "stores"
    shards = sorted(path.relative_to(stores) for path in stores.rglob("*.h5"))
    assert shards
    assert [(tmp_path / "stores" / s).read_bytes() for s in shards] == [
        (stores / s).read_bytes() for s in shards
    ]
    assert not (tmp_path / "runs").exists()
    assert not everything(elsewhere)


def test_a_given_store_is_opened_and_never_written(fitted: Path, place: Path, tmp_path: Path) -> None:
    stores = {p.parent for p in (fitted.parents[2] / "stores").glob("*/manifest.json")}
    options = [*config(), *small(place / "pair.yaml", tmp_path), "--trainer.callbacks=null"]
    codes = {
        (a, b): run("fit", *options, f"--data.source={a}", f"--data.target={b}")
        for a in stores
        for b in stores - {a}
    }
    assert sorted(codes.values()) == [0, 2]  # the right way round and the wrong one
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], ["nothing"]])
def test_the_command_itself_loads_no_library(args: list[str]) -> None:
    heavy = ["torch", "lightning", "transformers", "jsonargparse", "h5py"]
    code = (
        f"import sys; from mechdiff.__main__ import main; code = main({args}); "
        f"assert not set({heavy}) & set(sys.modules); raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if args == ["nothing"] else 0), done.stderr
    if args == ["--version"]:
        assert done.stdout == f"mechdiff {mechdiff.__version__}\n"
    elif args == ["nothing"]:
        assert done.stderr == f"mechdiff: unknown command 'nothing'; allowed: {', '.join(VERBS)}\n"
    else:
        assert "extract" in done.stdout


def test_the_scripts_run_as_they_are_typed(place: Path, tmp_path: Path) -> None:
    options = ["--pair", str(place / "pair.yaml"), "--layers=[9]", "--trainer.fast_dev_run=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *config(), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "mechdiff: site resid_post.9 is out of range; allowed layers: 0 to 3 (key: layers)\n"
    )


def test_layers_are_checked_against_the_shallower_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(place / "shallow", layers=2)
    pair = write_pair(place, "shallow.yaml", tuned={"id": "./shallow"})
    assert run("fit", *config(), "--pair", pair, "--layers=[2]", "--trainer.fast_dev_run=true") == 2
    assert "allowed layers: 0 to 1 (key: layers)" in capsys.readouterr().err
