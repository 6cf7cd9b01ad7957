"""Prompt files: what is read, and what is refused with which line."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mechdiff.data.prompts import Prompt, digest, evenly, load_prompts, select, spread
from mechdiff.errors import PromptError
from tests.callbacks.pairs import prompts

ROW = {
    "id": "en-1",
    "text": "What is tea?",
    "lang": "en",
    "label": "neutral",
    "split": "fit",
    "template": "what-is",
    "topic": "tea",
}
KEYS = "keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found "


def line(**changes: object) -> str:
    return json.dumps({k: v for k, v in (ROW | changes).items() if v is not ...}, ensure_ascii=False)


def write(folder: Path, *lines: str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_files_are_read_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    first = write(tmp_path, line(id="b"), "", "  ", line(id="a", twin="b"))
    second = write(tmp_path, line(id="c", text="Шай деген не?", lang="kk", twin=None), name="kk.jsonl")
    prompts = load_prompts([first, str(second)])
    assert [p.id for p in prompts] == ["b", "a", "c"]
    assert prompts[1].twin == "b"
    assert prompts[2] == Prompt("c", "Шай деген не?", "kk", "neutral", "fit", "what-is", "tea", None)


def test_unicode_line_separators_are_part_of_the_text(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    assert load_prompts([write(tmp_path, line(text=text))])[0].text == text


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "crlf.jsonl"
    path.write_bytes((line() + "\r\n").encode())
    assert len(load_prompts([path])) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", ":2: not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", f":2: {KEYS}list"),
        ('"text"', f":2: {KEYS}str"),
        (
            line(colour="red"),
            f":2: {KEYS}['colour', 'id', 'label', 'lang', 'split', 'template', 'text', 'topic']",
        ),
        (line(topic=...), f":2: {KEYS}['id', 'label', 'lang', 'split', 'template', 'text']"),
        (line(text=""), ":2: text must be a non-empty string; found ''"),
        (line(text="  "), ":2: text must be a non-empty string; found '  '"),
        (line(text=None), ":2: text must be a non-empty string; found None"),
        (line(id=7), ":2: id must be a non-empty string; found 7"),
        (line(twin=""), ":2: twin must be a non-empty string; found ''"),
        (line(label="sensitive"), ":2: label must be one of target, neutral; found 'sensitive'"),
        (line(split="test"), ":2: split must be one of fit, train, dev, eval; found 'test'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(bad: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, line(id="good"), bad)
    with pytest.raises(PromptError, match=f"^{re.escape(f'{path}{message} (key: pair.prompts)')}$"):
        load_prompts([path])


def test_a_missing_file_names_itself_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    message = f"cannot read prompt file {path}: No such file or directory (key: pair.prompts)"
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        load_prompts([path])


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"id": "caf\xe9"}')
    message = f"prompt file {path} is not UTF-8: byte 11 (key: pair.prompts)"
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        load_prompts([path])


def test_an_id_is_unique_over_all_files(tmp_path: Path) -> None:
    paths = [write(tmp_path, line(), name=name) for name in ("a.jsonl", "b.jsonl")]
    message = "prompt id 'en-1' occurs 2 times; ids must be unique (key: pair.prompts)"
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        load_prompts(paths)


def test_select_by_split_and_label(tmp_path: Path) -> None:
    lines = [line(id="a"), line(id="b", label="target"), line(id="c", split="eval")]
    prompts = load_prompts([write(tmp_path, *lines)])
    assert [p.id for p in select(prompts, "fit")] == ["a", "b"]
    assert [p.id for p in select(prompts, "fit", "target")] == ["b"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(("dev",), "split 'dev'"), (("eval", "target"), "split 'eval' and label 'target'")],
)
def test_an_empty_split_is_refused(arguments: tuple, what: str) -> None:
    prompts = [Prompt("c", "x", "en", "neutral", "eval", "t", "u")]
    message = f"no prompt has {what}; the files of pair.prompts must hold at least one"
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        select(prompts, *arguments)


def test_the_digest_follows_ids_texts_and_order_alone() -> None:
    a, b = (Prompt(i, t, "en", "neutral", "fit", "t", "u") for i, t in (("a", "x"), ("b", "y")))
    other = Prompt("a", "x", "kk", "target", "eval", "v", "w", "b")
    assert digest([a, b]) == digest([other, b])
    assert len({digest(p) for p in ([a, b], [b, a], [a], [])}) == 4
    assert digest([a]) != digest([Prompt("a", "x ", "en", "neutral", "fit", "t", "u")])


@pytest.mark.parametrize(("most", "count"), [(None, 16), (6, 6), (0, 0)])
def test_prompts_are_taken_evenly(most, count):
    texts = prompts()
    chosen = spread(texts, most)
    assert len(chosen) == count
    assert [p.id for p in chosen] == [p.id for p in texts if p in chosen]
    sizes = [sum((p.lang, p.label) == c for p in chosen) for c in {(p.lang, p.label) for p in texts}]
    assert max(sizes) - min(sizes) <= 1
    assert set(spread(texts[::-1], most)) == set(chosen)


def test_so_many_of_each_split_language_and_class_are_taken():
    texts = prompts()
    few = evenly(texts, 2)
    counts = Counter((p.split, p.lang, p.label) for p in texts)
    assert Counter((p.split, p.lang, p.label) for p in few) == {key: min(2, n) for key, n in counts.items()}
    assert [p.id for p in few] == [p.id for p in texts if p in few]
    assert evenly(texts, None) == texts
