"""The shipped prompt files: schema, counts, twins, disjoint splits, and text the generator reproduces."""

import json
import re
import runpy
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mechdiff.data.prompts import Prompt, for_domain, load_prompts

DATA = Path(__file__).parents[2] / "data"
FILES = {
    "prompts_freeform_en": {("eval", "target", "en"): 40, ("eval", "neutral", "en"): 40},
    "prompts_freeform_kk": {("eval", "target", "kk"): 40, ("eval", "neutral", "kk"): 40},
    "prompts_freeform_ru": {("eval", "target", "ru"): 40, ("eval", "neutral", "ru"): 40},
    "prompts_neutral": {("eval", "neutral", "en"): 24, ("eval", "neutral", "kk"): 24},
    "prompts_dev": {
        ("dev", "target", "en"): 20,
        ("dev", "target", "kk"): 20,
        ("dev", "neutral", "en"): 68,
        ("dev", "neutral", "kk"): 68,
    },
    "prompts_fit": {
        ("fit", "target", "en"): 160,
        ("fit", "target", "kk"): 40,
        ("fit", "neutral", "en"): 240,
        ("fit", "neutral", "kk"): 60,
    },
}
GENERATED = runpy.run_path(str(DATA / "make_prompts.py"))["render"]()
MATHS = "prompts_maths"
GENERATED[f"{MATHS}.jsonl"] = runpy.run_path(str(DATA / "make_maths.py"))["render"]()


def read(*names: str) -> list[Prompt]:
    return load_prompts([DATA / f"{name}.jsonl" for name in names])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@pytest.mark.parametrize("name", FILES)
def test_counts_per_split_label_and_language(name):
    assert Counter((p.split, p.label, p.lang) for p in read(name)) == FILES[name]


def test_ids_and_texts_are_unique_over_all_files():
    prompts = read(*FILES)  # a repeated id raises
    assert len({" ".join(words(p.text)) for p in prompts}) == len(prompts)


@pytest.mark.parametrize("split", ["dev", "eval"])
def test_enough_neutral_prompts_for_a_bound(split):
    assert sum(p.split == split and p.label == "neutral" for p in read(*FILES)) >= 120


def test_every_target_outside_fit_has_its_own_neutral_twin():
    prompts = read(*FILES)
    by_id = {p.id: p for p in prompts}
    targets = [p for p in prompts if p.label == "target" and p.split != "fit"]
    twins = [by_id[p.twin] for p in targets]
    assert len({t.id for t in twins}) == len(targets)
    for target, twin in zip(targets, twins, strict=True):
        assert twin.label == "neutral"
        assert (twin.lang, twin.split, twin.template) == (target.lang, target.split, target.template)
        shared = Counter(words(target.text)) & Counter(words(twin.text))
        assert shared.total() >= 3, (target.text, twin.text)
        assert 0.5 < len(twin.text) / len(target.text) < 2
    assert all(p.twin is None for p in prompts if p.label == "neutral" or p.split == "fit")


def test_splits_share_no_topic_and_no_template():
    prompts = read(*FILES)
    for first, second in combinations(["fit", "dev", "eval"], 2):
        for field in ("topic", "template"):
            values = [
                {getattr(p, field).casefold() for p in prompts if p.split == s} for s in (first, second)
            ]
            assert not values[0] & values[1], (first, second, field)


@pytest.mark.parametrize("name", FILES)
def test_length_and_script(name):
    low, high = {"prompts_fit": (12, 30)}.get(name, (6, 30))
    for prompt in read(name):
        assert low <= len(prompt.text.split()) <= high, prompt.text
        foreign = {"en": r"[\u0400-\u04ff]", "kk": r"[a-z]", "ru": r"[^а-яё\d\W]"}[prompt.lang]
        assert not re.search(foreign, prompt.text.casefold()), (
            prompt.text
        )  # look-alike letters change the tokens
        assert prompt.text == " ".join(prompt.text.split())


def test_russian_prompts_stand_in_for_the_kazakh_ones():
    kazakh, russian = read("prompts_freeform_kk"), read("prompts_freeform_ru")
    assert [(p.id[2:], p.label, p.template[2:]) for p in russian] == [
        (p.id[2:], p.label, p.template[2:]) for p in kazakh
    ]
    assert not {" ".join(words(p.text)) for p in russian} & {" ".join(words(p.text)) for p in kazakh}


def test_handwritten_targets_have_topics_of_their_own():
    for name in ("prompts_freeform_en", "prompts_freeform_kk", "prompts_freeform_ru", "prompts_dev"):
        targets = [p for p in read(name) if p.label == "target"]
        assert len({p.topic for p in targets}) == len(targets)
        assert len({p.template for p in targets}) == len(targets)
        openings = Counter((p.lang, *words(p.text)[:2]) for p in targets)
        assert max(openings.values()) <= 2, openings.most_common(3)


def test_fit_families_are_the_connected_components_of_topic_and_template():
    prompts = read("prompts_fit")
    names = {
        name: i for i, name in enumerate(sorted({p.template for p in prompts} | {p.topic for p in prompts}))
    }
    edges = np.array([(names[p.template], names[p.topic]) for p in prompts]).T
    graph = coo_matrix((np.ones(len(prompts)), edges), shape=(len(names),) * 2)
    count, component = connected_components(graph, directed=False)
    assert count == 30
    family = [component[names[p.template]] for p in prompts]
    assert set(Counter(family).values()) == {10, 20}  # two templates in Kazakh, four in English
    kinds = {(f, p.lang, p.label) for f, p in zip(family, prompts, strict=True)}
    assert len(kinds) == count
    assert Counter((lang, label) for _, lang, label in kinds) == {
        ("en", "target"): 8,
        ("en", "neutral"): 12,
        ("kk", "target"): 4,
        ("kk", "neutral"): 6,
    }


def test_fit_prompts_give_enough_aligned_positions():
    # A byte-level BPE never joins two words, so every English word ends a token in any two tokenizers.
    assert sum(len(p.text.split()) for p in read("prompts_fit") if p.lang == "en") >= 8_000


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_generator_reproduces_the_committed_file(name):
    assert (DATA / name).read_bytes() == GENERATED[name].encode()


def test_problems_share_no_wording_and_no_numbers_between_splits():
    problems = read(MATHS)
    assert Counter(p.split for p in problems) == {"fit": 160, "dev": 40, "eval": 60}
    assert len({p.text for p in problems}) == len(problems)
    for field in ("topic", "template"):
        where = {(getattr(p, field), p.split) for p in problems}
        assert len({name for name, _ in where}) == len(where)
    for p in problems:
        operation, a, b = p.topic.split()
        a, b = int(a), int(b)
        result = {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": b}[operation]
        assert p.answer == str(result)
        assert str(a) in p.text
        assert str(a * b if operation == "divide" else b) in p.text
        assert ((7 * a + 13 * b) % 8 == 0) == (p.split == "eval")


def test_for_a_sibling_that_solves_problems_all_else_is_neutral():
    prompts = for_domain(read(*FILES, MATHS), "cognitive")
    assert {p.answer is not None for p in prompts if p.label == "target"} == {True}
    assert {p.answer is not None for p in prompts if p.label == "neutral"} == {False}
    for split in ("dev", "eval"):
        assert sum(p.split == split and p.label == "neutral" for p in prompts) >= 120
    plain = read(*FILES)
    assert for_domain(plain, "cognitive") == for_domain(plain, "cultural") == plain


def test_openings_are_matched_in_number_and_length():
    rows = [json.loads(line) for line in (DATA / "openings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"lang", "kind", "text"} for row in rows)
    assert Counter((r["lang"], r["kind"]) for r in rows) == {
        (lang, kind): 8 for lang in ("en", "kk", "ru") for kind in ("refuse", "comply")
    }
    for lang in ("en", "kk", "ru"):
        refuse, comply = (
            [r["text"] for r in rows if (r["lang"], r["kind"]) == (lang, k)] for k in ("refuse", "comply")
        )
        assert len(set(refuse + comply)) == 16
        for a, b in zip(refuse, comply, strict=True):
            assert 3 <= len(a.split()) <= 6
            assert abs(len(a.split()) - len(b.split())) <= 1
    texts = [r["text"] for r in rows]  # no opening may contain another: their probabilities are summed
    assert not [(a, b) for a in texts for b in texts if a != b and b.startswith(a)]
