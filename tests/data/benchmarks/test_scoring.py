"""Generated answers: numbers, mathematics, and what cannot be read."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mechdiff.data.benchmarks.items import (
    Item,
)
from mechdiff.data.benchmarks.maths import MathJudge, equivalent
from mechdiff.data.benchmarks.scoring import Scored, score_math, score_number
from mechdiff.errors import ConfigError
from tests.data.benchmarks.rows import shipped


def test_unparsable_answers_are_listed_and_not_silently_zero():
    item = Item("g", "exact", "Q", gold="1250")
    texts = ["so $1,250.", "#### 1250", "I do not know", "maybe...", "12"]
    scored = [score_number(item, t) for t in texts]
    assert [s.correct for s in scored] == [True, True, None, None, False]
    assert [s.reason for s in scored] == [None, None, "no number", "not a number", None]
    assert score_number(item, "1250", strict=True) == Scored("g", None, None, "no number after ####")
    assert score_number(item, "1250.00").correct is False
    assert score_number(item, "1250.00", rule="value").correct is True


PAIRS = [
    (r"\frac{1}{2}", r"The answer is $\boxed{0.5}$.", "right"),
    (r"\frac{1}{2}", r"\boxed{\frac12}", "right"),
    (r"x<3", r"\boxed{(-\infty,3)}", "right"),  # math-verify says so in one direction only
    (r"(-\infty,3)", r"\boxed{x<3}", "right"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", "right"),
    (r"\text{Monday}", "Monday", "right"),
    (r"\text{Monday}", r"\boxed{monday}", "right"),
    (r"x^2-2x-15", r"\boxed{(x+3)(x-5)}", "right"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "right"),
    ("5", r"\boxed{3}, no: \boxed{5}", "right"),
    ("5", r"\boxed{5}, no: \boxed{3}", "wrong"),
    ("5", "I think it is 5", "right"),
    ("5", "I have no idea", "unparsable"),
    ("5", "", "unparsable"),
    ("5", r"\boxed{}", "unparsable"),
    ("(1,2)", r"\boxed{(2,1)}", "wrong"),
    (r"\text{Monday}", r"\boxed{\text{Friday}}", "wrong"),
]


def test_math_equivalence_in_threads_without_limits():
    with ThreadPoolExecutor(2) as pool:  # not the main thread
        verdicts = list(pool.map(lambda pair: equivalent(*pair[:2]), PAIRS))
    assert verdicts == [expected for *_, expected in PAIRS]


def test_math_equivalence_is_symmetric_on_the_shipped_answers():
    golds = [item.gold for item in shipped("math").items][::4]
    verdicts = {(a, b): equivalent(a, rf"\boxed{{{b}}}") for a in golds for b in golds}
    assert all(verdicts[a, a] == "right" for a in golds)
    assert all(verdicts[a, b] == verdicts[b, a] for a in golds for b in golds)
    assert all(equivalent(i.gold, i.meta["solution"]) == "right" for i in shipped("math").items)


def test_the_judge_agrees_and_ends_what_takes_too_long():
    with MathJudge(seconds=60) as judge:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda pair: judge(*pair[:2]), PAIRS[:6])) == ["right"] * 6
        judge.seconds = 0.5
        assert judge("5", r"\boxed{9^{9^{9^{9}}}}") == "undecided"
        judge.seconds = 60
        assert judge("5", r"\boxed{5}") == "right"  # the next answer gets a new process
        item = Item("m", "math", "Q", gold="5")
        assert score_math(item, r"\boxed{5}", judge) == Scored("m", "5", True)
        assert score_math(item, r"\boxed{6}", judge) == Scored("m", "6", False)
        assert score_math(item, "?", judge) == Scored("m", None, None, "unparsable")
    with pytest.raises(ConfigError, match="must be above 0"):
        MathJudge(seconds=0)
