"""Nothing that is read is executed, nothing leads out of its folder, and no token is kept."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mechdiff import checkpoints
from mechdiff.data.manifest import MANIFEST, Pass, Shard, checksum
from mechdiff.data.store import ActivationStore
from mechdiff.errors import (
    CheckpointError,
    ConfigError,
    PairError,
    StoreError,
    UsageError,
    cut,
    refuse_secrets,
    without_secrets,
)
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.spec import FilePath, ModelId, ModelSpec, PairSpec, may_read
from tests.bad_inputs import TOKEN, Harm, saved
from tests.fuzz.targets import ROWS, SITE, WIDTH, folder, store
from tests.workspace import save_model

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "mechdiff").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
SOURCES += [ROOT / "train.py", ROOT / "evaluate.py", *sorted((ROOT / "data").rglob("*.py"))]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
RUNS = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> Iterator[str]:
    """Yield what would execute what is read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {n}" for n in names if n.partition(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in RUNS or name in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
            yield f"calls {name}"
        if given.get("shell") or given.get("trust_remote_code") or given.get("allow_pickle"):
            yield f"{name} with {given}"
        for wanted in ("torch.load", "load_from_checkpoint"):
            if name.endswith(wanted) and given.get("weights_only") is not True:
                yield f"{name} without weights_only"
        if name.endswith(("special_dtype", "vlen_dtype")) or "object" in map(str, given.values()):
            yield f"{name} with objects"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path: Path) -> None:
    assert not list(dangers(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import numpy, dill",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Map.load_from_checkpoint(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "run(command, shell=True)",
        "h5py.special_dtype(vlen=str)",
        "file.create_dataset('x', dtype='object')",
    ],
)
def test_what_would_execute_is_seen(source: str) -> None:
    assert list(dangers(source))


def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Harm()))
    trace = tmp_path / "executed"
    assert trace.exists(), "the pickle is harmless, so that the test says nothing"
    trace.unlink()
    for number, body in enumerate([Harm(), {"hyper_parameters": {"_class_path": Harm()}}, [Harm()]]):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(saved(body))
        with pytest.raises(CheckpointError, match="is not a checkpoint written by a fit"):
            checkpoints.read(str(path))
        assert not trace.exists()


def test_a_model_that_brings_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = save_model(tmp_path / "model")
    code = "from pathlib import Path\nPath('executed').touch()\n"
    about = json.loads((place / "config.json").read_text())
    auto = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    (place / "config.json").write_text(json.dumps(about | {"model_type": "evil", "auto_map": auto}))
    (place / "evil.py").write_text(code)
    with pytest.raises(
        PairError, match=r"cannot be loaded as a causal|no tokenizer that can be read"
    ) as caught:
        load_model(ModelSpec(ModelId(str(place))))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()


# --- paths ----------------------------------------------------------------------------------------------


def spec(**more: object) -> PairSpec:
    models = {"base": ModelSpec(ModelId("a/b")), "tuned": ModelSpec(ModelId("a/c"))}
    return PairSpec(**{"name": "x", "prompts": [FilePath("p")], **models, **more})  # type: ignore[arg-type]


def test_the_command_line_opens_what_a_pair_file_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    file, far = home / "pair.yaml", FilePath(str(tmp_path / "far" / "p.jsonl"))
    assert spec().stay_inside(file)
    outside = spec(prompts=[far])
    allowed = [
        [f"--may_read={tmp_path / 'far'}"],
        ["--may_read", str(tmp_path)],
        ["--pair", "pair.yaml", f"--pair.prompts=[{far}]"],
        ["--pair", "pair.yaml", "--pair.prompts+", str(far)],
    ]
    for typed in allowed:
        assert outside.stay_inside(file, typed)
    refused = [
        [],
        [f"--may_read={tmp_path / 'fa'}"],
        ["--pair.openings=x"],
        ["--pair.prompts=[p]", "--pair", "pair.yaml"],  # the file comes after it
        ["--pair.prompts=[p]", "--config=c.yaml"],
    ]
    for typed in refused:
        with pytest.raises(PairError, match=r"outside .*home; allowed: .*--may_read=DIR.*pair.prompts\)$"):
            outside.stay_inside(file, typed)


def test_a_pair_in_the_configs_of_a_project_may_name_what_is_in_the_project(tmp_path: Path) -> None:
    pairs = tmp_path / "project" / "configs" / "pairs"
    pairs.mkdir(parents=True)
    assert spec(prompts=[FilePath(str(tmp_path / "project" / "data" / "p"))]).stay_inside(pairs / "x.yaml")
    with pytest.raises(PairError):
        spec(prompts=[FilePath(str(tmp_path / "data" / "p"))]).stay_inside(pairs / "x.yaml")
    assert may_read(["--may_read", "a", "--x", "--may_read=b"]) == ["a", "b"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of a small store."""
    root = store()[0]
    return Path(shutil.copytree(root, tmp_path / root.name))


def test_links_in_a_store_are_refused(copy: Path, tmp_path: Path) -> None:
    part = copy / Pass.name([SITE])
    for path in (part, part / MANIFEST, part / "shard-00000.h5", copy / MANIFEST):
        moved = tmp_path / "moved"
        path.rename(moved)
        path.symlink_to(moved)
        with pytest.raises(StoreError, match=r"symbolic link|not a shard: allowed are regular files"):
            ActivationStore.open(copy)
        path.unlink()
        moved.rename(path)
    (copy / "pass-other").symlink_to(tmp_path)  # with nothing in it that makes it a pass yet
    with pytest.raises(StoreError, match="pass-other is a symbolic link"):
        ActivationStore.open(copy)


@pytest.mark.parametrize("kind", ["objects", "texts", "doubles"])
def test_objects_in_a_shard_are_refused(kind: str, copy: Path) -> None:
    part = copy / Pass.name([SITE])
    name = f"sites/{SITE}"
    with h5py.File(part / "shard-00000.h5", "r+") as file:
        del file[name]
        if kind == "doubles":
            file[name] = np.ones((ROWS, WIDTH))
        else:
            file.create_dataset(
                name, (ROWS, WIDTH), h5py.string_dtype() if kind == "texts" else h5py.ref_dtype
            )
    Pass(part, {SITE: WIDTH}, [Shard("shard-00000.h5", ROWS, checksum(part / "shard-00000.h5"))]).write(
        copy.name
    )
    with pytest.raises(StoreError, match=f"does not hold {name} whole, as .* numbers of type float32"):
        ActivationStore.open(copy).read(SITE)


# --- tokens ---------------------------------------------------------------------------------------------


def test_a_token_is_no_part_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET", "DB_PASSWORD"):
        monkeypatch.setenv(name, f"{name.lower()}-hidden-value")
        told = str(ConfigError(f"cannot reach https://x:{name.lower()}-hidden-value@hub: {TOKEN}"))
        assert told == "cannot reach https://x:***@hub: ***"
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/somebody/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long-enough")
    for text in ("/home/somebody/token", "false-and-long-enough", "hf_short", "0123abcd" * 5):
        assert without_secrets(text) == text
    assert str(UsageError("plain")) == "plain"


def test_a_token_is_refused_where_it_would_be_kept() -> None:
    refuse_secrets(["--pair", "pair.yaml", "--layers=[1]"])
    for words, where in (
        ([f"--pair.base.revision={TOKEN}"], "--pair.base.revision holds"),
        (["--pair.base.revision", TOKEN], "the configuration holds"),
        ([f"root: {TOKEN}"], "the configuration holds"),
    ):
        with pytest.raises(ConfigError, match=where) as caught:
            refuse_secrets(words)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("value", ["a\nb", "\x1b[2J", "\u202e", "x" * 5000, ["y"] * 5000, 10**4000, None])
def test_a_value_in_a_message_is_short_and_on_one_line(value: object) -> None:
    assert len(cut(value)) <= 63
    assert cut(value).isprintable()


def test_the_small_store_is_sound() -> None:
    assert folder() in store()[0].parents
    assert torch.equal(ActivationStore.open(store()[0]).read(SITE), torch.ones(ROWS, WIDTH))
