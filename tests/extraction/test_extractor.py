import dataclasses
import errno
import gc
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import h5py
import lightning as L
import pytest
import torch
from filelock import FileLock

from mechdiff.data.store import ActivationStore
from mechdiff.errors import ActivationError, ConfigError, SiteError, StoreError
from mechdiff.extraction import extractor
from mechdiff.extraction.extractor import Extractor, ensure_store
from mechdiff.extraction.plan import Plan, encode_prompts
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.extraction.writer import AHEAD, ActivationWriter
from mechdiff.interventions.hooks import record
from mechdiff.interventions.sites import Site
from mechdiff.pairs.alignment import collate, common_start, encode
from tests.extraction import job
from tests.toys import SYSTEM, loaded, prompts

QUIET = {"enable_progress_bar": False}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def extract(root: Path, sites=job.SITES, model=None, texts=None, **kwargs) -> ActivationStore:
    options = {**QUIET, **kwargs.pop("trainer_kwargs", {})}
    spec = kwargs.pop("spec", job.spec(str(root)))
    return ensure_store(model or loaded(), texts or prompts(), sites, spec, trainer_kwargs=options, **kwargs)


def no_trainer(**_kwargs):
    raise AssertionError("nothing was missing")


def shards(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.h5"))}


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*.part")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the root of an uninterrupted extraction by one process."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("whole")
    store = extract(root)
    assert len(shards(root)) >= 4
    assert store.folder.parent == root
    return root


def run(*args: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.extraction.job", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_two_processes_write_what_one_writes_and_a_lost_shard_again(whole, tmp_path):
    done = run(tmp_path, 2, 0, "shard-00001.h5")  # for which one of them has nothing to do
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert shards(tmp_path) == shards(whole)
    manifests = [{p.relative_to(r): p.read_text() for p in r.rglob("*.json")} for r in (tmp_path, whole)]
    assert manifests[0] == manifests[1]
    assert not leftovers(tmp_path)


def test_resume_after_a_kill(whole, tmp_path):
    batches = 3 * 3 + AHEAD + 1  # the third shard is closed, which waits for the second to be complete
    done = run(tmp_path, 1, batches)
    assert done.returncode == -signal.SIGKILL
    complete = [p for p in tmp_path.rglob("*.h5") if p.with_suffix(".json").exists()]
    kept = {p: p.stat().st_mtime_ns for p in complete}
    assert 2 <= len(kept) <= batches / 3
    assert len(kept) < len(shards(whole))
    folder = next(iter(tmp_path.iterdir()))
    with pytest.raises(StoreError, match="holds no complete pass"):
        ActivationStore.open(folder)
    extract(tmp_path)
    assert shards(tmp_path) == shards(whole)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert not leftovers(tmp_path)


def test_a_killed_run_with_other_batches_is_not_continued(whole, tmp_path):
    class Stop(L.Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 7:
                raise RuntimeError("stop")

    spec = dataclasses.replace(job.spec(str(tmp_path)), tokens_per_batch=50, batches_per_shard=1)
    with pytest.raises(RuntimeError, match="stop"):
        extract(tmp_path, spec=spec, trainer_kwargs={"callbacks": [Stop()]})
    assert 7 - AHEAD <= len(shards(tmp_path)) <= 8
    assert not leftovers(tmp_path)
    extract(tmp_path)
    assert shards(tmp_path) == shards(whole)


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip", "unrecorded"])
def test_a_broken_shard_is_refused_then_written_again(whole, tmp_path, harm, caplog):
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    victim = sorted(root.rglob("*.h5"))[1]
    content = victim.read_bytes()
    if harm == "delete":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(content[:-1])
    else:
        victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    if harm == "unrecorded":
        victim.with_suffix(".json").write_text("{")
    said = "missing" if harm == "delete" else "damaged"
    with pytest.raises(StoreError, match=rf"{victim.name} is {said}"):
        ActivationStore.open(victim.parents[1])
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.h5") if p != victim}
    with caplog.at_level(logging.WARNING):
        extract(root)
    assert f"{victim.name} is missing or damaged; extracting it again" in caplog.text
    assert shards(root) == shards(whole)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_only_missing_sites_are_extracted(whole, tmp_path):
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.h5")}
    store = extract(root, ["resid_post.1", "mlp_out.0", "resid_post.3"])
    assert [str(s) for s in store.sites] == ["mlp_out.0", "resid_post.1", "head_z.2", "resid_post.3"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(root.rglob("pass-*"))) == 2
    again = extract(root, ["head_z.2", "mlp_out.0"], trainer_factory=no_trainer)
    assert again.sites == store.sites


def test_values_are_those_of_the_model(whole):
    store, model = ActivationStore.open(next(iter(whole.iterdir()))), loaded()
    sites = [Site(1), Site(2, "head_z")]
    residual = 0.0
    for index in (0, 20, 47):
        prompt = encode(model.tokenizer, prompts()[index].text)
        with record(model.model, sites) as states:
            model.model(input_ids=torch.tensor([prompt.input_ids]))
        rows = (store.rows.example == index).nonzero().flatten()
        positions = store.rows.position[rows]
        assert positions.tolist() == [t for t, region in enumerate(prompt.regions) if region in (1, 2)]
        assert store.rows.offset[rows].tolist() == [prompt.offsets[t] for t in positions]
        for site in sites:
            found = store.read(site, rows)
            residual = max(residual, float((found - states[site][0, positions].flatten(1)).abs().max()))
    assert residual < 1e-6  # measured 4.5e-8 (values up to 0.24): a text alone against a padded batch


def test_bfloat16_is_the_rounded_value_to_the_bit(whole, tmp_path):
    exact = ActivationStore.open(next(iter(whole.iterdir())))
    rounded = extract(tmp_path, spec=dataclasses.replace(job.spec(str(tmp_path)), dtype="bfloat16"))
    assert rounded.identity.key != exact.identity.key
    for site in exact.sites:
        assert torch.equal(rounded.read(site), exact.read(site).bfloat16().float())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"texts": prompts()[:-1]}, "prompts"),
        ({"model": loaded(seed=1)}, "model"),
        ({"model": loaded(dtype=torch.bfloat16)}, "model"),
        ({"model": dataclasses.replace(loaded(340), fingerprint="toy-300-0")}, "tokenizer"),
        ({"model": loaded(template=SYSTEM)}, "template"),
        ({"positions": "user"}, "positions"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_another_identity_is_another_store(whole, tmp_path, change, field):
    own = {name: value for name, value in change.items() if name in ("positions", "dtype")}
    spec = dataclasses.replace(job.spec(str(tmp_path)), **own)
    rest = {name: value for name, value in change.items() if name not in own}
    other = extract(tmp_path, ["resid_post.0"], spec=spec, **rest)
    folder = next(iter(whole.iterdir()))
    assert other.folder.name != folder.name
    with pytest.raises(StoreError, match=rf"was made from another {field}: .* wanted "):
        ActivationStore.open(folder, other.identity)


def test_models_that_read_the_same_tokens_share_a_plan(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(extractor, "_PLANS", {})
    monkeypatch.setattr(
        extractor, "encode_prompts", lambda *args: read.append(args[0]) or encode_prompts(*args)
    )
    spec = ExtractionSpec(str(tmp_path), tokens_per_batch=256)
    models = [loaded(), loaded(seed=1), loaded(template=SYSTEM), loaded(template=SYSTEM, seed=1)]
    for model in models:
        ensure_store(model, prompts(), ["resid_post.0"], spec, trainer_kwargs=QUIET)
    assert [tokenizer is models[n].tokenizer for tokenizer, n in zip(read, (0, 2), strict=True)] == [True] * 2
    ensure_store(models[0], prompts()[:4], ["resid_post.0"], spec, trainer_kwargs=QUIET)
    assert len(read) == 3
    assert len(extractor._PLANS) == 1


def test_a_new_topic_needs_no_extraction(whole, tmp_path):
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    texts = [dataclasses.replace(p, topic="other") for p in prompts()]
    store = extract(root, texts=texts, trainer_factory=no_trainer)
    assert {e.topic for e in store.examples} == {"other"}


def test_nan_names_prompt_and_layer_and_leaves_no_file(tmp_path):
    model = loaded(seed=5)
    model.model.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(
        ActivationError, match=r"prompt '(en|kk)-.-.-..', token \d+, at resid_post.2 \(layer 2\)"
    ):
        extract(tmp_path, ["resid_post.1", "resid_post.2"], model)
    assert not list(tmp_path.rglob("*.h5*"))
    assert not leftovers(tmp_path)


def test_nan_in_one_prompt_names_that_prompt(tmp_path):
    model, texts = loaded(seed=5), prompts()
    texts[30] = odd = dataclasses.replace(texts[30], text=texts[30].text + " Ω")
    tokens = encode(model.tokenizer, odd.text)
    final = tokens.regions.index(2) - 1  # the second byte of the Ω, in no other text
    model.model.get_input_embeddings().weight.data[tokens.input_ids[final]] = float("inf")
    with pytest.raises(ActivationError, match=f"prompt '{odd.id}', token"):
        extract(tmp_path, ["resid_post.0"], model, texts)
    assert not leftovers(tmp_path)


def test_the_model_is_not_in_the_module_tree(tmp_path):
    model = loaded()
    plan = Plan(encode_prompts(model.tokenizer, prompts(), None), "all", 128, 3)
    writer = ActivationWriter(tmp_path, plan.shards, "key", "float32")
    extractor = Extractor(model, [Site(0)], plan, writer, [p.id for p in prompts()])
    assert list(extractor.modules()) == [extractor]
    assert not extractor.state_dict()
    extractor.train()
    assert not model.model.training


def test_memory_keeps_no_predictions(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    step = Extractor.predict_step

    def counted(self, batch):
        nonlocal most
        rows = step(self, batch)
        alive.append(weakref.ref(rows))
        most = max(most, sum(ref() is not None for ref in alive))
        return rows

    monkeypatch.setattr(Extractor, "predict_step", counted)
    extract(tmp_path, ["resid_post.0"])
    gc.collect()
    assert len(alive) > 10
    assert most <= AHEAD + 2  # those that wait, the one that is written and the newest
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("bad", range(3))
def test_a_shard_with_a_hole_is_never_completed(tmp_path, monkeypatch, bad):
    step, count = Extractor.predict_step, iter(range(100))

    def failing(self, batch):
        rows, number = step(self, batch), next(count)

        def finish():
            if number == 3 + bad:  # of the second shard; by the time it shows, more batches were run
                raise ActivationError("lost")
            return rows()

        return finish

    monkeypatch.setattr(Extractor, "predict_step", failing)
    with pytest.raises(ActivationError, match="lost"):
        extract(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.h5")] == ["shard-00000.h5"]
    assert not leftovers(tmp_path)
    monkeypatch.undo()
    extract(tmp_path)
    assert not leftovers(tmp_path)


def test_a_mask_would_change_nothing(whole):
    store, model = ActivationStore.open(next(iter(whole.iterdir()))), loaded()
    plan = Plan(encode_prompts(model.tokenizer, prompts(), None), "all", 128, 3)
    batch = plan.batch(plan.shards[-2], 0, model.tokenizer.pad_token_id)
    chosen = [plan.encoded[example] for example in plan.shards[-2].batches[0]]
    _, mask = collate(chosen, model.tokenizer.pad_token_id)
    assert not mask.all()
    text, token = batch.where.unbind(-1)
    with record(model.model, [Site(1)]) as states:
        model.model(input_ids=batch.input_ids, attention_mask=mask)
    kept = torch.isin(store.rows.example, batch.rows.example.unique())
    torch.testing.assert_close(
        store.read("resid_post.1", kept.nonzero().flatten()), states[Site(1)][text, token]
    )


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    write, count = h5py.Dataset.__setitem__, itertools.count()

    def full(self, *args):
        if next(count) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *args)

    monkeypatch.setattr(h5py.Dataset, "__setitem__", full)
    with pytest.raises(StoreError, match=r"cannot write to .*: No space left on device; .*extraction.root"):
        extract(tmp_path)
    assert not leftovers(tmp_path)
    monkeypatch.undo()
    extract(tmp_path)


def test_it_says_how_fast_and_how_evenly(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mechdiff"):
        extract(tmp_path)
    model = loaded()
    encoded = [encode(model.tokenizer, p.text) for p in prompts()]
    tokens = sum(len(e) - common_start(encoded) for e in encoded)
    assert f"base: {tokens} tokens in " in caplog.text
    assert " s by 1, " in caplog.text
    assert "the busiest had 0.00% more than the mean" in caplog.text


def test_the_users_trainer_cannot_change_what_is_written(whole, tmp_path):
    options = {
        "use_distributed_sampler": True,
        "limit_predict_batches": 1,
        "fast_dev_run": True,
        "logger": True,
    }
    extract(tmp_path, trainer_kwargs={**options, "precision": "bf16-mixed", "inference_mode": True})
    assert shards(tmp_path) == shards(whole)
    assert [path.name for path in tmp_path.iterdir()] == [next(iter(whole.iterdir())).name]


def test_the_model_can_still_be_differentiated(tmp_path):
    model = loaded(seed=3)
    extract(tmp_path, model=model)
    inputs = model.model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).requires_grad_()
    model.model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None


def test_progress_bar_says_what_it_does(tmp_path, capfd):
    spec = job.spec(str(tmp_path))
    ensure_store(loaded(), prompts(), ["resid_post.0"], spec)
    assert "extracting base, 1 site" in capfd.readouterr().out


def test_a_store_in_use(whole, tmp_path, monkeypatch):
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    folder = next(iter(root.iterdir()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        FileLock(folder / ".lock"),
        pytest.raises(StoreError, match=r"another run is writing .*extraction.root"),
    ):
        extract(root, ["resid_post.0"])


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write to .*: .* \(key: extraction.root\)"):
        extract(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positions": "first"},
            "positions is 'first'; allowed: all, user, last (key: extraction.positions)",
        ),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: float32, bfloat16 (key: extraction.dtype)"),
        (
            {"tokens_per_batch": 0},
            "tokens_per_batch is 0; allowed: 1 or more (key: extraction.tokens_per_batch)",
        ),
        (
            {"batches_per_shard": 0},
            "batches_per_shard is 0; allowed: 1 or more (key: extraction.batches_per_shard)",
        ),
    ],
)
def test_bad_spec(tmp_path, change, message):
    spec = dataclasses.replace(ExtractionSpec(root=str(tmp_path)), **change)
    with pytest.raises(ConfigError) as caught:
        extract(tmp_path, spec=spec)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_layer_out_of_range(tmp_path):
    with pytest.raises(SiteError, match=r"site resid_post\.4 is out of range"):
        extract(tmp_path, ["resid_post.4"])
    assert not list(tmp_path.iterdir())


def test_what_every_prompt_begins_with_is_run_once(tmp_path):
    model, texts = loaded(template=SYSTEM, seed=7), prompts()
    encoded = [encode(model.tokenizer, p.text) for p in texts]
    start, seen = common_start(encoded), []
    assert start > 5
    handle = model.model.get_input_embeddings().register_forward_hook(
        lambda _m, inputs, _o: seen.append(inputs[0].shape)
    )
    spec = dataclasses.replace(job.spec(str(tmp_path)), tokens_per_batch=1)  # no padding
    store = extract(tmp_path, ["resid_post.2"], model, texts, spec=spec)
    handle.remove()
    assert seen[0] == (1, start)
    assert sum(rows * length for rows, length in seen[1:]) == sum(len(e) - start for e in encoded)
    with record(model.model, [Site(2)]) as states:
        model.model(input_ids=torch.tensor([encoded[3].input_ids]))
    rows = (store.rows.example == 3).nonzero().flatten()
    whole = states[Site(2)][0, store.rows.position[rows]]
    torch.testing.assert_close(store.read(Site(2), rows), whole, atol=1e-6, rtol=0)


def test_a_run_that_only_has_to_write_the_manifest(whole, tmp_path, caplog):
    root = tmp_path / "stores"
    shutil.copytree(whole, root)
    next(root.glob("*/pass-*/manifest.json")).unlink()
    with caplog.at_level(logging.INFO, "mechdiff"):
        store = extract(root)
    assert [str(site) for site in store.sites] == job.SITES
    assert shards(root) == shards(whole)
    assert "tokens/s" not in caplog.text
