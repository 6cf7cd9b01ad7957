import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechdiff.functional.scoring import choose, distractors, question_prompt
from mechdiff.functional.stats import generator


@given(
    st.lists(
        st.tuples(st.text("aбқ é", min_size=1, max_size=6), st.floats(-50, -0.01)), min_size=2, max_size=5
    ),
    st.data(),
)
def test_choices_are_those_of_plain_division(rows, data):
    options, logprobs = zip(*rows, strict=True)
    gold = data.draw(st.integers(0, len(rows) - 1))
    choice = choose(torch.tensor(logprobs, dtype=torch.float64), options, gold)
    plain = np.array(logprobs)
    assert choice.acc == (np.argmax(plain) == gold)
    assert choice.acc_norm == (np.argmax(plain / [len(o) for o in options]) == gold)
    assert choice.acc_bytes == (np.argmax(plain / [len(o.encode()) for o in options]) == gold)
    assert choice.logprob == logprobs[gold]
    assert choice.logprob_among == pytest.approx(plain[gold] - np.logaddexp.reduce(plain), abs=1e-12)


def test_characters_bytes_and_tokens_can_choose_three_winners():
    options = ["ab", "абвгд", "abcdefg"]
    choices = [choose(torch.tensor([-3.0, -6.5, -8.4]), options, gold) for gold in range(3)]
    assert [(c.acc, c.acc_norm, c.acc_bytes) for c in choices] == [
        (True, False, False),
        (False, False, True),
        (False, True, False),
    ]


def test_of_equal_options_the_first_is_chosen():
    choice = choose(torch.tensor([-2.0, -1.0, -1.0]), ["a", "b", "c"], 1)
    assert choice.acc
    assert choice.chosen == 1


def test_prompts():
    text, scored = question_prompt("Кто?", ["он", "она"], "letter", "ru", "Текст.")
    assert text == "Текст.\nВопрос: Кто?\nA) он\nB) она\nОтвет:"
    assert scored == ["A", "B"]
    assert question_prompt("Who?", ["x", "y"], "cloze", "tr") == ("Question: Who?\nAnswer:", ["x", "y"])


@pytest.mark.parametrize("gold", ["12", "0", "1", "-3", "1,250", "2.5"])
def test_distractors_are_wrong_and_different(gold):
    found = distractors(gold, [], generator(0, gold))
    assert len(set(found)) == 3
    assert float(gold.replace(",", "")) not in map(float, found)
    assert distractors(gold, [], generator(0, gold)) == found
    if float(gold.replace(",", "")) >= 0:
        assert min(map(float, found)) >= 0


def test_distractors_of_an_expression_are_other_answers():
    assert set(distractors(r"\frac{1}{x}", [r"\frac{1}{x}", "x", "x", "y^2"], generator(0))) == {"x", "y^2"}
