"""A steered model in the harness scores and writes as `mechdiff.steer` with plain forward passes does."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mechdiff import steer
from mechdiff.errors import UsageError
from mechdiff.handles.files import write
from mechdiff.lm_eval.__main__ import MISSING, main
from mechdiff.lm_eval.model import PairLM
from mechdiff.pairs.loading import load_pair
from mechdiff.study import read_pair
from tests.handles.make import handle
from tests.workspace import ROOT, workspace

CUTS = [
    ("tell me a story", " about snow"),
    ("tell me a story", " about bread"),
    ("tell me a", " story about snow"),  # the whole text of the first, cut elsewhere
    ("tell me a story about", " snow"),
    ("list facts about May", " now"),
    ("list facts about May", " then"),
    ("why do", " so"),
    ("", "tell me"),
]
SHORT = 12
"""A context so small that the harness cuts most texts on their left."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair and a handle of each kind that is tried."""
    folder = tmp_path_factory.mktemp("user")
    spec = read_pair(workspace(folder))
    for kind in ("add", "mapped", "ablate"):
        model = getattr(load_pair(spec), "tuned" if kind == "ablate" else "base").model
        write(folder / f"{kind}.safetensors", handle(model, kind))
    return folder


def ours(place: Path, kind: str | None = None, **options: object) -> PairLM:
    path = str(place / f"{kind}.safetensors") if kind else None
    return PairLM(str(place / "pair.yaml"), handle=path, device="cpu", **{"batch_size": 3} | options)


def scores(harness: HFLM, cuts: Sequence[tuple[str, str]] = CUTS) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, cut, n) for n, cut in enumerate(cuts)]
    return harness.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def forward(
    harness: PairLM, context: list[int], answer: list[int], begin: int, limit: int, kind: str | None
) -> tuple[float, bool]:
    """Score one request alone by one forward pass."""
    text = (context + answer)[-(limit + 1) :][:-1]
    ids = torch.tensor([text])
    if kind:
        with steer(harness.model, harness.handle, prompt_tokens=[begin], any_model=True):
            logits = harness.model(ids).logits
    else:
        logits = harness.model(ids).logits
    logs = logits[0, -len(answer) :].log_softmax(-1)
    found = logs.gather(1, torch.tensor(answer)[:, None])
    return found.sum().item(), logs.argmax(-1).tolist() == answer


@pytest.mark.parametrize("kind", ["add", "mapped", "ablate"])
@pytest.mark.parametrize("limit", [512, SHORT])
def test_likelihoods_are_those_of_steer_and_one_forward_pass_each(place: Path, kind: str, limit: int) -> None:
    harness, plain = (
        ours(place, kind, max_length=limit),
        ours(place, model="tuned" if kind == "ablate" else "base"),
    )
    for cut, (score, greedy), (clean, _) in zip(CUTS, scores(harness), scores(plain), strict=True):
        context, answer = (
            harness._encode_pair(*cut) if cut[0] else ([harness.prefix_token_id], harness.tok_encode(cut[1]))
        )
        lost = max(0, len(context) + len(answer) - limit - 1)
        begin = max(2, len(context) - lost)  # the last token of the prompt, but never the first of the text
        expected, best = forward(harness, context, answer, begin, limit, kind)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == best
        assert abs(score - clean) > 1e-2


def test_where_the_context_ends_matters(place: Path) -> None:
    """The same text cut elsewhere is steered from elsewhere: the last logits must not be shared."""
    harness = ours(place, "mapped")
    early, late = (harness._encode_pair(*CUTS[n]) for n in (0, 3))
    assert early[0] + early[1] == late[0] + late[1]
    _, tail = scores(harness, [CUTS[0], CUTS[3]])[1], late[1]
    whole = forward(harness, late[0], tail, len(early[0]), 512, "mapped")
    assert abs(whole[0] - scores(harness, [CUTS[0], CUTS[3]])[1][0]) > 1e-3


def test_batches_of_automatic_size_change_nothing(place: Path) -> None:
    found = scores(ours(place, "mapped", batch_size="auto", max_batch_size=4))
    expected = scores(ours(place, "mapped"))
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("how", ["no handle", "alpha 0"])
def test_without_a_handle_it_is_the_harness_s_own_model(place: Path, how: str) -> None:
    harness = ours(place, model="base") if how == "no handle" else ours(place, "mapped", alpha=0)
    exact = how == "no handle"  # with a handle batches are composed by where contexts end, and
    # logits are never shared by a text that is cut in two places, of which the harness scores one wrongly.
    theirs = HFLM(str(place / "base"), device="cpu", dtype="float32", batch_size=3, logits_cache=exact)
    for (score, greedy), (expected, best) in zip(scores(harness), scores(theirs), strict=True):
        assert score == (expected if exact else pytest.approx(expected, abs=1e-5))
        assert greedy == best
    requests = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 6, "until": []}), n)
        for n, (text, _) in enumerate(CUTS[:7])
    ]
    assert harness.generate_until(requests, True) == theirs.generate_until(requests, True)
    rolled = [Instance("loglikelihood_rolling", {}, (text,), n) for n, (text, _) in enumerate(CUTS[:7])]
    for a, b in zip(
        harness.loglikelihood_rolling(rolled, True), theirs.loglikelihood_rolling(rolled, True), strict=True
    ):
        assert a == (b if exact else pytest.approx(b, abs=1e-5))


def test_what_it_writes_is_what_the_steered_model_writes(place: Path) -> None:
    harness, plain = ours(place, "mapped"), ours(place, model="base")
    texts = sorted({text for text, _ in CUTS if text})
    requests = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 8, "until": []}), n)
        for n, text in enumerate(texts)
    ]
    written = harness.generate_until(requests, disable_tqdm=True)
    for text, answer in zip(texts, written, strict=True):
        ids = harness.tokenizer(text, return_tensors="pt").input_ids
        with steer(harness.model, harness.handle):
            out = harness.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert answer == harness.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert written != plain.generate_until(requests, disable_tqdm=True)


def test_a_text_without_a_prompt_is_edited_at_all_tokens_but_the_first(place: Path) -> None:
    harness, text = ours(place, "mapped"), "tell me a story about snow then list facts"
    (found,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], True)
    expected, _ = forward(harness, [harness.prefix_token_id], harness.tok_encode(text), 2, 512, "mapped")
    assert found == pytest.approx(expected, abs=1e-4)


def task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a task of the harness whose questions lie beside it, and let it read no other task file."""
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    rows = [
        {"q": text, "options": [" snow", " bread"], "gold": n % 2} for n, (text, _) in enumerate(CUTS[:6])
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    body = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{options}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tiny_choice.yaml").write_text(json.dumps(body))  # JSON is YAML
    return folder


def test_the_command_runs_a_task_and_says_what_was_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_args = f"pair={place / 'pair.yaml'},handle={place / 'mapped.safetensors'},alpha=0.5"
    options = [
        "--tasks",
        "tiny_choice",
        "--include_path",
        str(task(tmp_path, monkeypatch)),
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert main(["--model_args", model_args, "--device", "cpu", "--log_samples", *options]) == 0
    (table,) = tmp_path.glob("out/**/results_*.json")
    body = json.loads(table.read_text())
    about = body["config"]["mechdiff"]
    assert (about["model"], about["edit"], about["alpha"], about["site"]) == (
        "base",
        "mapped",
        0.5,
        "resid_post.1",
    )
    assert body["config"]["model_sha"] == about["weights"]
    (samples,) = tmp_path.glob("out/**/samples_*.jsonl")
    harness = ours(place, "mapped", alpha=0.5)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found = [float(response[0][0]) for response in sample["resps"]]
        expected = [s for s, _ in scores(harness, [(sample["doc"]["q"], o) for o in (" snow", " bread")])]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pair": ""}, "no pair is named"),
        ({"model": "third"}, "model is 'third'; allowed: base, tuned, reference"),
        ({"model": "reference"}, "names no reference"),
        ({"dtype": "float16"}, "unknown option dtype; allowed: pair, model, handle, alpha"),
        ({"device": "abacus"}, "cannot use device abacus"),
        ({"alpha": 1.0}, "alpha and positions are those of a handle"),
        ({"handle": "mapped", "model": "tuned"}, "the handle is for base of tiny"),
        ({"handle": "mapped", "positions": "some"}, "positions is 'some'; allowed: answer, all"),
        ({"handle": "none"}, "is not a file"),
    ],
)
def test_a_mistake_is_named(place: Path, options: dict[str, str], said: str) -> None:
    given = {"pair": str(place / "pair.yaml"), "device": "cpu"} | options
    if "handle" in given:
        given["handle"] = str(place / f"{given['handle']}.safetensors")
    with pytest.raises(UsageError, match=said):
        PairLM(**given)


def test_more_than_one_process_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes were started"):
        ours(place)


def test_a_mistake_on_the_command_line_is_one_line(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--tasks", "tiny_choice", "--include_path", str(task(tmp_path, monkeypatch))]
    assert main(["--model_args", f"pair={place / 'pair.yaml'},model=third", *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mechdiff: model is 'third'")


def test_without_the_harness_one_line_says_how_to_get_it() -> None:
    code = (
        "import sys\nsys.modules['lm_eval'] = None\n"
        "from mechdiff.lm_eval.__main__ import main\nraise SystemExit(main(['--tasks', 'arc_easy']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"mechdiff: {MISSING}\n"
