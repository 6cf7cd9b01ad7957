"""Chat templates that fail, reach out of their sandbox or change the message; pad tokens."""
# ruff: noqa: E501 - a table of messages

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mechdiff.errors import PromptError
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.pairs.alignment import encode
from tests.toys import PLAIN, loaded, prompts, tokenizer

MESSAGE = "{{ messages[0]['content'] }}"
OUT = "cycler.__init__.__globals__.os.mkdir('executed')"


def told(template: object, text: str = "what is snow") -> str:
    """Return how a template is refused."""
    fast = copy.deepcopy(tokenizer())
    fast.chat_template = template
    with pytest.raises(PromptError) as caught:
        encode(fast, text)
    return str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nuser') }}",
        "{{ 1 / 0 }}",
        "{{ messages[3]['content'] }}",
        "{{ messages | nothing }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content.nothing.more }}",
        "{% if %}",
        "{{ [] + 3 }}",
        {"other": PLAIN},
    ],
    ids=str,
)
def test_a_template_that_fails_is_told_in_one_line(template: object) -> None:
    said = told(template)
    assert said.startswith("the chat template fails on ")
    assert said.endswith("(key: pair.prompts)")
    assert said.isprintable()


@pytest.mark.parametrize(
    "template",
    [
        f"{{{{ {OUT} }}}}",
        f"{{{{ self.__init__.{OUT.removeprefix('cycler.__init__.')} }}}}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0]('executed') }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{% import 'os' as os %}{{ os.mkdir('executed') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
    ],
)
def test_a_template_that_reaches_out_is_refused_and_nothing_runs(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = told(template + MESSAGE)
    assert said.startswith(
        ("the chat template fails on ", "the chat template does not contain", "the chat template changes")
    )
    assert said.isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("no message at all", "the chat template does not contain the user's message (key: pair.prompts)"),
        ("{{ messages[0]['content'] | upper }}", "the chat template changes the message 'what is snow' (key: pair.prompts)"),
        ("{{ messages[0]['content'] | replace(' ', '') }}", "the chat template changes the message 'what is snow' (key: pair.prompts)"),
        ("{{ messages[0]['content'][:6] }}", "the chat template changes the message 'what is snow' (key: pair.prompts)"),
    ],
)  # fmt: skip
def test_a_template_that_changes_the_message_is_refused(template: str, said: str) -> None:
    assert told(template) == said


def test_an_enormous_message_is_encoded_whole() -> None:
    text = "what is snow? " * 20_000
    found = encode(tokenizer(), text.strip())
    assert found.user_bytes == len(text.strip())
    assert max(found.offsets) == found.user_bytes


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_rows_do_not_depend_on_the_pad_token(pad: int | None, tmp_path: Path) -> None:
    kept = []
    for number, token in enumerate(
        ("<|end|>", None if pad is None else tokenizer().convert_ids_to_tokens(pad))
    ):
        model = loaded()
        object.__setattr__(model, "tokenizer", copy.deepcopy(model.tokenizer))
        model.tokenizer.pad_token = token
        assert number == 0 or model.tokenizer.pad_token_id == pad
        spec = ExtractionSpec(str(tmp_path / str(number)), tokens_per_batch=128)
        quiet = {"enable_progress_bar": False}
        kept.append(ensure_store(model, prompts()[:12], ["resid_post.2"], spec, trainer_kwargs=quiet))
    assert kept[0].identity == kept[1].identity
    assert torch.equal(kept[0].read("resid_post.2"), kept[1].read("resid_post.2"))
    assert all(torch.equal(a, b) for a, b in zip(kept[0].rows, kept[1].rows, strict=True))
