"""Multiple choice against lm-evaluation-harness: the same log-probabilities and choices, item by item."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from mechdiff.callbacks.choices import chosen
from mechdiff.data.benchmarks.items import Item
from mechdiff.data.benchmarks.loaders import multiple_choice
from mechdiff.functional.scoring import DELIMITER, FORMATS, choose, question_prompt
from mechdiff.pairs.voice import Voice, encode_pair, logprob_correct
from tests import toys

ITEMS_PER_LANGUAGE = 12
DATA = Path(__file__).parents[1] / "data" / "benchmarks"


def items() -> list[Item]:
    """Read shipped questions in both languages, evenly over the file."""
    found = []
    for lang in ("en", "kk"):
        lines = (DATA / f"mc_{lang}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:: len(lines) // ITEMS_PER_LANGUAGE]]
        found += [multiple_choice(row, lang) for row in rows[:ITEMS_PER_LANGUAGE]]
    return found


@pytest.fixture(scope="module")
def voice() -> Voice:
    loaded = toys.loaded(size=340, context=1024, seed=2)
    for parameter in loaded.model.parameters():  # sharpen: options must differ by much more than rounding
        parameter.data *= 3
    ids = torch.arange(len(loaded.tokenizer))
    return Voice(loaded, ids, loaded.tokenizer, dict(enumerate(ids.tolist())))


@pytest.fixture(scope="module")
def harness(voice: Voice) -> HFLM:
    return HFLM(
        pretrained=voice.loaded.model,
        tokenizer=voice.tokenizer,
        backend="causal",
        device="cpu",
        batch_size=7,
        max_length=1024,
    )


def their_scores(harness: HFLM, pairs: list[tuple[str, str]]) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]


class Plain(ConfigurableTask):
    """The harness's own metrics for a question that is already written, without a data set."""

    def download(self, *_args: object, **_kwargs: object) -> None:
        self.dataset = {"test": Dataset.from_list([{"choices": ["a", "b"], "gold": 0, "text": "t"}])}


@pytest.fixture(scope="module")
def task() -> Plain:
    return Plain(
        config={
            "task": "plain",
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "text",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm", "acc_bytes")
            ],
        }
    )


@pytest.mark.parametrize("form", FORMATS)
def test_log_probabilities_and_choices_are_those_of_the_harness(
    voice: Voice, harness: HFLM, task: Plain, form: str
) -> None:
    questions = items()
    assert len(questions) >= 20
    written = [question_prompt(i.question, i.options, form, i.lang, i.context) for i in questions]
    theirs = iter(their_scores(harness, [(t, DELIMITER + o) for t, options in written for o in options]))
    worst, verdicts = 0.0, set()
    for item, (text, options) in zip(questions, written, strict=True):
        spoken = voice.score(text, [DELIMITER + option for option in options])
        expected = [next(theirs) for _ in options]
        worst = max(worst, *(abs(a - b) for a, b in zip(spoken.free, expected, strict=True)))
        choice = choose(torch.tensor(spoken.free), options, item.gold)
        doc = {"choices": options, "gold": item.gold, "text": text}
        judged = task.process_results(doc, [(score, False) for score in expected])
        assert judged == {
            "acc": choice.acc,
            "acc_norm": choice.acc_norm,
            "acc_bytes": choice.acc_bytes,
        }
        assert logprob_correct(voice, text, options[item.gold]) == pytest.approx(
            expected[item.gold], abs=1e-4
        )
        verdicts.add(tuple(judged.values()))
    assert worst < 1e-4
    assert len(verdicts) > 1


def test_what_is_observed_is_what_the_harness_would_report(voice: Voice, harness: HFLM) -> None:
    questions = [
        Item(f"q{n}", "mc", i.question, options=i.options, gold=i.gold, lang=i.lang)
        for n, i in enumerate(items()[::4])
    ]
    for form in FORMATS:
        hits = {"acc": 0.0, "acc_norm": 0.0}
        for item in questions:
            text, options = question_prompt(item.question, item.options, form, item.lang)
            scores = their_scores(harness, [(text, DELIMITER + o) for o in options])
            norm = [s / len(o) for s, o in zip(scores, options, strict=True)]
            hits["acc"] += scores.index(max(scores)) == item.gold
            hits["acc_norm"] += norm.index(max(norm)) == item.gold
        seen = [o for o in chosen(voice, questions, "en_mc") if o.params.get("format") == form]
        for name, count in hits.items():
            ours = [o for o in seen if o.quantity == f"mc_{name}" and not o.params["masking"]]
            assert sum(o.value for o in ours) == count


CUTS = [
    ("Answer:", " A"),
    ("Answer: ", "A"),
    ("Жауап:  ", "Абай"),
    ("", "Answer"),
    ("", "<|end|>Answer"),
    ("<|end|>Answer:", " bread"),
    ("<|sys|>Answer:", " bread"),
    ("tell me a sto", "ry about snow"),
]


def with_begin_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a tokenizer so that it puts a begin token before every text."""
    begun = copy.deepcopy(tokenizer)
    begun.bos_token = "<|sys|>"
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|sys|> $A", special_tokens=[("<|sys|>", begun.convert_tokens_to_ids("<|sys|>"))]
    )
    return begun


@pytest.mark.parametrize("begin", [False, True])
def test_texts_are_cut_as_the_harness_cuts_them(voice: Voice, begin: bool) -> None:
    tokenizer = with_begin_token(voice.tokenizer) if begin else voice.tokenizer
    harness = HFLM(
        pretrained=voice.loaded.model, tokenizer=tokenizer, backend="causal", device="cpu", max_length=1024
    )
    seen = []
    harness._loglikelihood_tokens = lambda requests, **_: seen.extend(requests) or [(0.0, False)] * len(CUTS)
    their_scores(harness, CUTS)
    ours = [encode_pair(tokenizer, *cut) for cut in CUTS]
    assert ours == [(context, continuation) for _, context, continuation in seen]
    assert (ours[0][0][0] == tokenizer.bos_token_id) == begin
