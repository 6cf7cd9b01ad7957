import pytest
import torch
from jsonargparse import ArgumentParser

from mechdiff.data.contrast import ContrastPairs, check_bound, contrast, needed
from mechdiff.data.prompts import Prompt
from mechdiff.errors import PromptError, StoreError
from mechdiff.functional.proportions import binomial_interval
from tests.modules.planted import alternating, planted


def pairs(path, label=alternating, **options):
    return planted(path, lambda x, _: x + 1, sites=1, label=label, kind=ContrastPairs, **options)


def prompt(number, split="dev", label="neutral"):
    return Prompt(f"{split}-{label}-{number}", "text", "en", label, split, "template", "topic")


def test_every_row_has_the_class_of_its_prompt(tmp_path):
    data = pairs(tmp_path, positions=["last", "user"], batch_size=30)
    data.setup("fit")
    rows = 0
    for batch in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        wanted = [int(data.prompts[i].label == "target") for i in batch["prompt"].tolist()]
        assert batch["label"].tolist() == wanted
        assert set(batch) == {"source", "target", "prompt", "group", "label"}
        rows += len(wanted)
    assert rows == 40 * 7
    first = next(iter(data.val_dataloader()))["label"]
    assert torch.equal(data.read(data.rows("val"))["label"][:30], first)


def test_every_split_has_both_classes_and_the_last_position_alone(tmp_path):
    data = pairs(tmp_path)
    assert data.positions == ["last"]
    data.setup("fit")
    for split in ("train", "val", "test"):
        assert data.read(data.rows(split))["label"].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("label", "missing"),
    [
        (lambda _: "neutral", "split train has no target rows at last"),
        (lambda _: "target", "split train has no neutral rows at last"),
        (lambda i: "target" if i == 0 else "neutral", "split (train|val|test) has no target rows"),
    ],
)
def test_an_empty_class_is_named(tmp_path, label, missing):
    with pytest.raises(StoreError, match=missing) as error:
        pairs(tmp_path, label).setup("fit")
    assert "\n" not in str(error.value)
    assert "data.positions" in str(error.value)


def test_it_parses_like_its_parent(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ContrastPairs, "data")
    config = parser.parse_args([f"--data={ContrastPairs.__module__}.ContrastPairs", "--data.batch_size=7"])
    assert config.data.init_args.positions == ["last"]
    assert config.data.init_args.batch_size == 7
    assert config.data.init_args.tokens is None


LABELS = ("target", "neutral")


def test_prompts_by_class():
    prompts = [prompt(i, split, label) for i in range(2) for split in ("dev", "eval") for label in LABELS]
    found = contrast(prompts, "dev")
    assert [p.id for p in found.target] == ["dev-target-0", "dev-target-1"]
    assert [p.id for p in found.neutral] == ["dev-neutral-0", "dev-neutral-1"]
    with pytest.raises(PromptError, match="label 'target'"):
        contrast([p for p in prompts if p.label == "neutral"], "eval")


def test_needed_is_the_first_number_that_bounds_a_change():
    assert needed(0.05) == 59
    assert binomial_interval(0, 59, side="upper").high <= 0.05 < binomial_interval(0, 58, side="upper").high
    assert needed(0.5) == 5


def test_too_few_neutral_prompts_say_how_many_are_needed():
    prompts = [*(prompt(i) for i in range(120)), *(prompt(i, "eval") for i in range(40)), prompt(0, "fit")]
    assert len(check_bound(prompts, "dev")) == 120
    assert len(check_bound(prompts, "eval", 40)) == 40
    with pytest.raises(PromptError, match=r"eval has 40 .*allow 7\.2%.*120 or more \(59 bound 5%") as error:
        check_bound(prompts, "eval")
    assert "\n" not in str(error.value)
    with pytest.raises(PromptError, match="0 neutral prompts, which allow anything"):
        check_bound(prompts, "train")
