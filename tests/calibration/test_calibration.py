"""A reduced calibration of a tiny model: what is obvious is found, what is no difference stays silent."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mechdiff.calibration import run as running
from mechdiff.calibration.cases import NULLS, QUESTIONS, TUNING_SEED, Case, grid
from mechdiff.calibration.cells import read_calibration
from mechdiff.calibration.measure import parts
from mechdiff.calibration.planting import case_prompts, plant
from mechdiff.calibration.run import finished, read_lines, run_cases
from mechdiff.calibration.score import ANY, PROPOSE, mattering, table
from mechdiff.calibration.table import _provenance, write_table
from mechdiff.callbacks.handle_evaluation import two_engines, two_sides
from mechdiff.callbacks.states import read_ends
from mechdiff.commands.calibrate import TABLE_SEED, _leave, main
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.pairs.organisms import plant_weights, planted_pair
from tests.toys import loaded

SEED = 5
OBVIOUS = [
    Case("policy_1", 1.0, 8, 0),
    Case("policy_2", 1.0, 8, 1),
    Case("policy_2", 1.0, 8, 3),  # of the draws between, one direction does nine tenths in so small a model
    Case("block", 0.1, 8, 0),
    Case("spread", 0.1, 8, 0),
    Case("relay", 1.0, 8, 0),
    Case("flip", 1.0, 8, 0),
    Case("rotate", 1.0, 8, 0),
]
SILENT = [Case(kind, 0.0, 16 if kind == "halves" else 8, 0) for kind in NULLS]


def base_model():
    return loaded(context=512)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory):
    """Run the cases; return the folder, and the base with a copy of its weights from before."""
    folder, base = tmp_path_factory.mktemp("calibration"), base_model()
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    torch.set_num_threads(1)
    assert run_cases(lambda: base, [*OBVIOUS, *SILENT], folder, SEED, say=lambda _: None)
    return folder, base, before


def cells_of(lines, **where):
    found = [c for c in map(asdict, table(lines).cells) if all(c[k] == v for k, v in where.items())]
    assert found, where
    return found


def test_the_base_is_the_same_after_every_case(calibrated):
    _, base, before = calibrated
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())


def test_what_is_obvious_is_found(calibrated):
    lines = [line for line in read_lines(calibrated[0]) if line["kind"] not in NULLS]
    assert len(lines) == len(OBVIOUS)
    for method in ("patch", "graft"):
        for cell in cells_of(lines, quantity="onset_exact", method=method):
            assert cell["estimate"] == 1, cell
        for cell in cells_of(lines, quantity="power", question="rq1", method=method):
            assert cell["estimate"] == 1, cell
    assert cells_of(lines, quantity="read_exact", kind="relay")[0]["estimate"] == 1
    assert cells_of(lines, quantity="block_recall", kind="spread", method="graft")[0]["estimate"] == 1
    for quantity in ("k_error_zero", "principal_angle"):
        (cell,) = cells_of(lines, quantity=quantity, method="paired_svd", kind="policy", strength=1.0)
        assert (cell["successes"], cell["trials"]) == (3, 3)
    for kind in ("flip", "rotate"):
        for method in ("own_change", "graft"):
            assert cells_of(lines, quantity="heads_first", kind=kind, method=method)[0]["estimate"] == 1


def test_what_is_no_difference_stays_silent(calibrated):
    lines = [line for line in read_lines(calibrated[0]) if line["kind"] in NULLS]
    asked = {(kind, question) for kind in NULLS for question in QUESTIONS[kind]}
    cells = [c for c in cells_of(lines, quantity="false_positives") if c["kind"] in NULLS]
    assert {(c["kind"], c["question"]) for c in cells} == asked
    for cell in cells:
        if cell["method"].startswith(ANY):
            assert cell["target"] is None
        elif cell["kind"] in ("swapped", "halves"):  # tests at the level 0.05, many draws of them
            assert cell["low"] <= 0.05, cell
        elif cell["method"] not in PROPOSE:
            assert cell["successes"] == 0, cell


def test_a_wrong_answer_counts_as_one(calibrated):
    lines = copy.deepcopy(
        [line for line in read_lines(calibrated[0]) if line["kind"] in ("policy_1", "flip")]
    )
    for line in lines:
        line["found"]["rq1"]["patch"]["into_tuned"]["onset"] -= 1
        for curve in line["found"]["rq1"]["graft"].values():
            curve["recovery"] = [[0.9, 0.9, 0.9], *curve["recovery"][1:]]
    (policy,), (flip,) = ([line for line in lines if line["kind"] == kind] for kind in ("policy_1", "flip"))
    policy["found"]["rq3"]["k"]["paired_svd"]["value"] = 3
    flip["found"]["rq4"]["own_change"].reverse()
    assert all(c["estimate"] == 0 for c in cells_of(lines, quantity="onset_exact", method="patch"))
    assert all(c["estimate"] == 1 for c in cells_of(lines, quantity="onset_within_one", method="patch"))
    assert all(c["estimate"] == 0 for c in cells_of(lines, quantity="onset_exact", method="graft"))
    assert cells_of(lines, quantity="k_error_zero", method="paired_svd")[0]["estimate"] == 0
    assert cells_of(lines, quantity="heads_first", method="own_change")[0]["estimate"] == 0
    assert cells_of(lines, quantity="heads_first", method="graft")[0]["estimate"] == 1


def test_what_a_block_does_by_itself_is_measured():
    base = base_model()
    tuned, _ = plant_weights(base, ["block.1", "block.2"], 0.5)
    texts = [p for p in case_prompts(Case("block", 0.1, 4, 0), SEED) if p.split == "eval"]
    pair = planted_pair(base, tuned)
    none, one, other = parts(pair, texts, [0, 1, 2])
    assert none == 0 < min(one, other)
    alone = planted_pair(base, plant_weights(base, ["block.1"], 0.5)[0])
    ends = [read_ends(side, []).log_p for side in two_sides(alone, texts, two_engines(alone))]
    assert parts(alone, texts, [1])[0] >= float(kl_divergence(*ends).mean()) > 0


def test_a_part_that_does_nothing_need_not_be_found(calibrated):
    (line,) = [line for line in read_lines(calibrated[0]) if line["kind"] == "flip"]
    line = copy.deepcopy(line)
    first, *others = line["truth"]["layers"]
    assert mattering(line)[0] == first
    line["truth"]["parts"][0] = 0.0
    assert mattering(line) == others
    planted = [tuple(head) for head in line["truth"]["heads"]]
    for method in ("own_change", "graft"):  # the one in the first block is no longer seen
        line["found"]["rq4"][method] = [r for r in line["found"]["rq4"][method] if tuple(r[:2]) != planted[0]]
    line["found"]["rq1"]["patch"]["into_tuned"]["onset"] = others[0]
    for method in ("own_change", "graft"):
        assert cells_of([line], quantity="heads_first", method=method)[0]["estimate"] == 1
        assert cells_of([line], quantity="head_recall", method=method)[0]["estimate"] == 1
    assert cells_of([line], quantity="onset_exact", method="patch")[0]["estimate"] == 1
    line["found"]["rq4"]["graft"].insert(0, [0, 0, 9.0])
    assert cells_of([line], quantity="heads_first", method="graft")[0]["estimate"] == 0


def test_churn_is_counted_in_heads(calibrated):
    (line,) = [line for line in read_lines(calibrated[0]) if line["kind"] == "swapped"]
    line = copy.deepcopy(line)
    line["found"]["rq4"] |= {"readings": 40, "above_floor": 8, "heads_above": 11, "heads": 20}
    (share,) = cells_of([line], method="churn_label_swap", kind="swapped")
    (any_head,) = cells_of([line], method="any head: churn_label_swap", kind="swapped")
    assert (share["successes"], share["trials"], share["target"]) == (11, 800, 0.05)
    assert (any_head["successes"], any_head["trials"], any_head["target"]) == (8, 40, None)


def test_the_table_depends_on_what_was_found_alone(calibrated, tmp_path):
    lines = read_lines(calibrated[0])
    mixed = random.Random(0).sample(lines, len(lines))
    assert table(mixed) == table(lines)
    places = ("question", "quantity", "method", "kind", "strength", "prompts")
    keys = [tuple(getattr(cell, place) for place in places) for cell in table(lines).cells]
    assert len(set(keys)) == len(keys)
    path, page, *_ = write_table(calibrated[0], SEED, [*OBVIOUS, *SILENT])
    body = json.loads(path.read_text())
    assert read_calibration(path.parent).cells == table(lines).cells
    assert "onset within one" in page.read_text(encoding="utf-8")
    assert body["provenance"]["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert body["provenance"]["seed"] == SEED
    assert body["provenance"]["tuning_seed"] == TUNING_SEED != TABLE_SEED
    assert body["provenance"]["cases"] == len(lines)


def test_lines_from_several_machines_are_all_named(calibrated):
    one, *others = read_lines(calibrated[0])
    one["software"]["python"] = "3.99"
    found = _provenance([one, *others], SEED)
    assert found["python"] == ["3.99", others[0]["software"]["python"]]
    assert found["packages"] == one["software"]["packages"]


def test_what_is_done_is_not_run_again(calibrated, tmp_path):
    folder = calibrated[0]
    before = (folder / running.RAW).read_bytes()

    def load():
        raise AssertionError("nothing is left to run")

    assert run_cases(load, [*OBVIOUS, *SILENT], folder, SEED)
    assert (folder / running.RAW).read_bytes() == before
    with pytest.raises(ConfigError, match="another seed than 6"):
        run_cases(load, OBVIOUS, folder, 6)


def unmeasured(base, case, seed):
    spent = {"cpu_seconds": 0.0, "seconds": 0.0}
    where = {"device": "cpu", "seed": seed, "base": "x", "software": {}}
    return {**case.entry(), "truth": {}, "found": {}, **where, **spent}


def test_processes_share_the_cases_and_the_last_one_knows(tmp_path, monkeypatch):
    cases, run_by, done = grid(1, prompts=4), [], []

    def run(rank):
        done.append((rank, run_cases(lambda: base, cases, tmp_path, SEED, rank, lambda _: None)))

    def measured(base, case, seed):
        run_by.append(case)
        if len(run_by) == 1:  # while the first process is at its first case, another comes and goes
            run(1)
        return unmeasured(base, case, seed)

    monkeypatch.setattr(running, "measure", measured)
    base = base_model()
    monkeypatch.setattr(running, "_check_base", lambda folder, base: None)
    run(0)
    assert done == [(1, False), (0, True)]
    assert sorted(run_by) == sorted(cases) == sorted(finished(tmp_path, SEED))


def test_a_case_that_broke_off_is_run_again(tmp_path, monkeypatch):
    cases, base = [Case("copy", 0.0, 4, 0)], base_model()

    def broken(base, case, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "measure", broken)
    with pytest.raises(KeyboardInterrupt):
        run_cases(lambda: base, cases, tmp_path, SEED, say=lambda _: None)
    assert not finished(tmp_path, SEED)
    monkeypatch.setattr(running, "measure", unmeasured)
    assert run_cases(lambda: base, cases, tmp_path, SEED, say=lambda _: None)


def test_seeds_and_draws_are_streams_of_their_own():
    base, case = base_model(), OBVIOUS[0]
    texts = {seed: [p.text for p in case_prompts(case, seed)] for seed in (TUNING_SEED, TABLE_SEED)}
    assert texts[TUNING_SEED] != texts[TABLE_SEED]
    assert texts[TABLE_SEED] == [p.text for p in case_prompts(case, TABLE_SEED)]
    heads = {
        plant(base, Case("flip", 1.0, 8, draw), case_prompts(Case("flip", 1.0, 8, draw), seed), seed)[1].heads
        for seed in (TUNING_SEED, TABLE_SEED)
        for draw in range(4)
    }
    assert len(heads) > 3
    strong, weak = (
        plant(base, Case("flip", s, 8, 0), case_prompts(Case("flip", s, 8, 0), SEED), SEED)[1]
        for s in (1.0, 0.1)
    )
    assert strong.heads == weak.heads


@pytest.mark.parametrize(("topics", "count"), [(1, 32), (2, 16), (4, 16), (4, 32)])
def test_messages_are_distinct_and_splits_share_no_thing(topics, count):
    prompts = case_prompts(Case(f"policy_{topics}", 1.0, count, 0), SEED)
    assert len({p.text for p in prompts}) == len(prompts) == 8 * count
    by_id = {p.id: p for p in prompts}
    things = {}
    for split, wanted in (("fit", 2 * count), ("dev", count), ("eval", count)):
        targets = [p for p in prompts if p.split == split and p.label == "target"]
        assert len(targets) == wanted
        assert all(by_id[p.twin].label == "neutral" and by_id[p.twin].split == split for p in targets)
        things[split] = {p.topic for p in prompts if p.split == split}
    assert not things["fit"] & things["dev"] | things["fit"] & things["eval"] | things["dev"] & things["eval"]


def test_a_grid_that_was_cut_off_is_a_smaller_one():
    whole = grid(4)
    assert len(set(whole)) == len(whole)
    assert grid(2, ["flip"]) == [c for c in whole if c.kind == "flip" and c.draw < 2]
    assert [c.draw for c in whole if c.kind == "policy_1"] == sorted(
        c.draw for c in whole if c.kind == "policy_1"
    )
    assert sum(c.kind == "bf16" for c in whole) == 64


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--repeats", "0"], "repeats is 0; allowed: 1 or more (key: --repeats)"),
        (["--kinds", "flip,nose"], "kinds has 'nose'; allowed: policy_1"),
        (["--threads", "0"], "threads is 0"),
        (["--device", "tpu", "--kinds", "copy"], "device is 'tpu'; allowed: auto, cpu, cuda"),
        (
            ["--prompts", "99", "--kinds", "policy_1", "--repeats", "1"],
            "prompts is 99; allowed with 1 topics",
        ),
    ],
)
def test_a_mistake_is_one_line(args, said, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(running, "load_base", lambda identity, device: base_model())
    assert main([*args, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_process_leaves_the_group_that_started_it():
    """Else a trainer in it would wait for the others, or take their devices."""
    group = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "HOME": "/"}
    assert _leave(group) == ((5, 8), 1)
    assert group == {"HOME": "/"}
    assert _leave(group) == ((0, 1), 0)


def test_a_plan_says_how_many_cases_there_are(tmp_path, capsys):
    assert main(["--plan", "--repeats", "3", "--out", str(tmp_path / "none")]) == 0
    assert f"{len(grid(3))} cases" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
