"""A handle leaves its run and does elsewhere what it did there."""
# ruff: noqa: E501 - tables of messages

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from mechdiff import steer
from mechdiff.__main__ import main
from mechdiff.callbacks.gate import everywhere
from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.cli import MechdiffCLI
from mechdiff.cli import main as fit
from mechdiff.commands.exporting import _fit, choose
from mechdiff.errors import HandleError
from mechdiff.handles.control_vector import write_control_vector
from mechdiff.handles.files import ROLES, read
from mechdiff.interventions.generation import generate
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.sites import Site
from mechdiff.provenance import provenance
from mechdiff.results import Record, Results
from tests.handles.make import handle
from tests.models import tiny_model, tokens
from tests.workspace import ROOT, small, workspace

PROMPTS = [ids.tolist()[: 4 + i] for i, ids in enumerate(tokens(3, 9))]
STATES = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def chosen(edit: str, k: int | None, alpha: float | None = None, site: str = "resid_post.2") -> Record:
    params = {"edit": edit} | ({"alpha": alpha, "solver": "diff_mean_svd"} if alpha else {})
    why = None if k else "none_feasible"
    return Record(
        "rq3", "chosen_handle", k, 8, "directions", site=site, split="dev", params=params, reason=why
    )


class Swept(MechdiffCLI):
    """A run whose results name handles, as those of a sweep do."""

    def after_test(self) -> None:
        stores = {role: store.identity.key for role, store in self.stores.items()}
        origin = provenance(self.pair, self.cfg.seed_everything, stores)
        handles = [
            chosen("interchange", 3, 1.0, site="resid_post.1"),
            chosen("mapped", None, site="resid_post.1"),
            chosen("mapped", 2, 0.5),
            chosen("add", 1, 2.0),
            chosen("ablate", 2, 1.0),
        ]
        table = Results([*self.model.records(), *handles], origin)
        table.write(Path(self.trainer.log_dir) / "results.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on a tiny pair."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    trainer = ["max_epochs=1", "num_sanity_val_steps=0", "enable_progress_bar=false", "devices=1"]
    options = [
        "--model=mechdiff.modules.SteeringSubspace",
        "--model.k=3",
        "--data=mechdiff.data.contrast.ContrastPairs",
        "--extraction.positions=last",
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        "--trainer.logger.name=fit",
        *(f"--trainer.{option}" for option in trainer),
    ]
    assert fit("fit", [*options, *small(workspace(folder), folder)], Swept) == 0
    return folder / "runs" / "fit" / "version_0"


def export(*options: object) -> int:
    try:
        return main(["export", *map(str, options)])
    except SystemExit as left:
        return int(left.code or 0)


def load(place: Path, role: str = "base") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(place.parents[2] / role, dtype=torch.float32).eval()


def test_by_default_it_is_what_the_run_chose(place, capsys):
    assert export(place) == 0
    path = place / "handles" / "mapped-k2-resid_post.2.safetensors"
    said = capsys.readouterr().out
    assert said.startswith(
        f"{path}: mapped, k 2, alpha 0.5, diff_mean_svd, at resid_post.2 of base (as the run"
    )
    assert "also chosen: add at resid_post.2, ablate at resid_post.2" in said
    m, table = read(path).manifest, Results.read(place / "results.json")
    assert (m.site, m.kind, m.k, m.alpha, m.model, m.solver) == (
        "resid_post.2", "mapped", 2, 0.5, "base", "diff_mean_svd",
    )  # fmt: skip
    assert m.fingerprint == table.provenance["models"]["base"]["weights"]
    assert m.provenance["pair"] == "tiny"


@pytest.mark.parametrize(
    ("edit", "k", "alpha"),
    [("add", 1, 2.0), ("mapped", 3, 1.0), ("mapped", 2, 0.5), ("amplify", 2, 0.5), ("ablate", 2, 1.0)],
)
def test_it_does_elsewhere_what_it_did_in_its_run(place, tmp_path, edit, k, alpha):
    site, out = Site(1), tmp_path / "h.safetensors"
    cell = ["--edit", edit, "--k", k, "--alpha", alpha, "--site", site, "--solver", "diff_mean_svd"]
    cell = cell[:-2] if edit == "add" else cell
    assert export(place, *cell, "--out", out) == 0
    (checkpoint,) = (place / "checkpoints").glob("*.ckpt")
    module, own = _fit(checkpoint, Results.read(place / "results.json")), read(out)
    solver = own.manifest.solver
    there = Handle(site, edit, k, alpha, solver)
    assert torch.equal(own.change(STATES), there.change(module, STATES))
    model = load(place, ROLES[edit])
    with steer(model, out):
        steered = generate(model, PROMPTS, 6)
        logits = model(torch.tensor(PROMPTS[:1])).logits
    with intervene(model, {site: everywhere(module, there)}):
        assert generate(model, PROMPTS, 6) == steered
        assert torch.equal(model(torch.tensor(PROMPTS[:1])).logits, logits)
    assert not torch.equal(model(torch.tensor(PROMPTS[:1])).logits, logits)
    other = load(place, "tuned" if ROLES[edit] == "base" else "base")
    with pytest.raises(HandleError, match=f"the handle is for {ROLES[edit]} of tiny"):
        steer(other, out).__enter__()


def test_a_control_vector_says_what_llama_cpp_reads(place, tmp_path, capsys):
    out = tmp_path / "v.gguf"
    assert export(place, "--edit", "add", "--out", out) == 0
    assert "llama.cpp adds it at every token" in capsys.readouterr().out
    reader = GGUFReader(out)
    text = {name: field.contents() for name, field in reader.fields.items()}
    assert text["general.architecture"] == "controlvector"
    assert text["controlvector.model_hint"] == "llama"
    assert text["controlvector.layer_count"] == 1
    (vector,) = reader.tensors
    assert (vector.name, vector.tensor_type.name, vector.data.shape) == ("direction.2", "F32", (32,))
    # Slot N - 1 of the loader's buffer is direction.N; block L adds slot L - 1 to its output.
    buffer = torch.zeros(3, 32)
    buffer[int(vector.name.partition(".")[2]) - 1] = torch.from_numpy(vector.data.copy())
    slots = {Site(layer): buffer[layer - 1] for layer in (1, 2, 3)}
    assert export(place, "--edit", "add", "--out", tmp_path / "h.safetensors") == 0
    steered, model, ids = read(tmp_path / "h.safetensors"), load(place), tokens(2, 6)
    with intervene(model, {site: lambda h, _p, v=v: h + v for site, v in slots.items()}):
        logits = model(ids).logits
    with intervene(model, {steered.site: lambda h, _p: steered.change(h)}):
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-6)
    assert steered.site == Site(2)
    assert (model(ids).logits - logits).abs().max() > 1e-3
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            {"kind": "mapped", "k": 4},
            "edit mapped with k 4 is no fixed shift, and a control vector is only added",
        ),
        ({"site": "resid_post.0"}, r"cannot steer resid_post.0; allowed: resid_post.1 and above"),
        ({"site": "attn_out.2"}, "cannot steer attn_out.2"),
    ],
)
def test_what_a_control_vector_cannot_say_is_refused(tmp_path, make, says):
    made = handle(**{name: value for name, value in make.items() if name != "site"})
    made = replace(made, manifest=replace(made.manifest, site=make.get("site", made.manifest.site)))
    with pytest.raises(HandleError, match=says):
        write_control_vector(tmp_path / "v.gguf", made, "llama")
    assert not list(tmp_path.iterdir())


ASKED = dict.fromkeys(("edit", "k", "alpha", "site", "solver"))


@pytest.mark.parametrize(
    ("records", "asked", "found"),
    [
        ([("add", 1, 2.0)], {}, ("add", 1, 2.0, "resid_post.2", "diff_mean_svd", "as the run chose")),
        ([("interchange", 4, 1.0), ("mapped", 2, 0.5)], {}, ("mapped", 2, 0.5, "resid_post.2", "diff_mean_svd", "as the run chose")),
        ([("mapped", 2, 0.5)], {"alpha": 3.0}, ("mapped", 2, 3.0, "resid_post.2", "diff_mean_svd", "the run's, altered")),
        ([("mapped", 2, 0.5)], {"edit": "add", "alpha": 1.0, "site": "resid_post.1"}, ("add", 1, 1.0, "resid_post.1", None, "as asked")),
    ],
)  # fmt: skip
def test_what_is_not_asked_for_is_what_the_run_chose(records, asked, found):
    cell = choose(Results([chosen(*r) for r in records]), ASKED | asked)
    assert tuple(cell.values()) == (*found, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--edit", "interchange"], "edit is 'interchange', which needs the states of the other model; allowed: add"),
        (["--edit", "reverse"], "which needs the states of the other model"),
        (["--edit", "magic"], "edit is 'magic'; allowed: add (in base), mapped (in base), amplify (in base), ablate"),
        (["--edit", "amplify"], "the run chose no such handle (none_feasible); give --k --alpha --site (key: edit)"),
        (["--edit", "add", "--k", "2"], "k is 2 with edit add; allowed: 1"),
        (["--k", "4"], "k is 4 with solver diff_mean_svd; allowed: 1 to 3 (key: k)"),
        (["--k", "two"], "'two' is given; allowed: a whole number, null (key: k)"),
        (["--edit", "ablate", "--alpha", "0.5"], "alpha is 0.5 with kind ablate; allowed: 1"),
        (["--edit", "add", "--k", "1", "--alpha", "1", "--site", "resid_post.3"], "site is resid_post.3; allowed: resid_post.1, resid_post.2"),
        (["--solver", "magic", "--k", "1", "--alpha", "1", "--site", "resid_post.1", "--edit", "add"], "solver is 'magic'; allowed: paired_svd"),
        (["--positions", "first"], "has positions 'first' with edit mapped; allowed: answer, all"),
        (["--out", "h.pt"], "out is h.pt; allowed: a file that ends in .safetensors or .gguf (key: out)"),
        (["--out", "v.gguf"], "edit mapped with k 2 is no fixed shift"),
        (["--results", "nowhere.json"], "cannot read nowhere.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(place, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    assert export(place, *options) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("mechdiff: ")
    assert says in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())
    assert sorted(place.rglob("*")) == before


def test_a_run_must_be_one_and_its_models_unchanged(place, tmp_path, capsys):
    def says(*options: object) -> str:
        assert export(*options) == 2
        return capsys.readouterr().err

    assert "is neither a run's folder nor a file" in says(tmp_path / "nowhere")
    assert "holds 0 checkpoints; give one" in says(tmp_path)
    copied = tmp_path / "run"
    shutil.copytree(place, copied)
    (checkpoint,) = (copied / "checkpoints").glob("*.ckpt")
    assert export(checkpoint, "--out", tmp_path / "h.safetensors") == 0  # a checkpoint will do
    shutil.copy(checkpoint, copied / "checkpoints" / "second.ckpt")
    assert f"holds 2 checkpoints; give one of {checkpoint.name}, second.ckpt" in says(copied)
    alone = tmp_path / "alone.ckpt"
    shutil.copy(checkpoint, alone)
    assert "no results.json beside" in says(alone)
    capsys.readouterr()
    assert export(alone, "--results", copied / "results.json", "--out", tmp_path / "i.safetensors") == 0
    table = Results.read(copied / "results.json")
    table.provenance["models"]["base"]["weights"] = "others"
    table.write(copied / "results.json")
    assert "the files of base have changed since the run" in says(alone, "--results", copied / "results.json")
    table.provenance["stores"]["source"] = "others"
    table.write(copied / "results.json")
    assert "fitted to other activations" in says(alone, "--results", copied / "results.json")
    alone.write_bytes(b"nothing")
    assert "is not a checkpoint written by a fit" in says(alone, "--results", copied / "results.json")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom mechdiff.__main__ import main\n"
        "try:\n    main(['export', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'lightning', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("[]")
    assert "--alpha" in done.stdout


def test_the_handle_of_a_model_that_is_no_pair_of_this_run_is_refused():
    with pytest.raises(HandleError, match="the handle is for"):
        steer(tiny_model(), handle()).__enter__()
