import pytest

from mechdiff.functional.style import MARKERS, style_markers

_KAZAKH = {"hedge": 1, "deference": 2, "politeness": 1, "first_person": 1}  # a hedge can hold "my"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat sat on the mat.", {}),
        ("I think it might rain; maybe my umbrella helps.", {"hedge": 3, "first_person": 2}),
        ("Please forgive me. Thank you!", {"politeness": 3, "first_person": 1}),
        ("With all due respect to the elders", {"deference": 3}),
        ("in line i of table A, e.g. I", {"first_person": 1}),
        ("Менің ойымша, сіз құрметті ақсақалсыз, рақмет.", _KAZAKH),
        ("Пожалуйста, по-моему, с уважением к старейшинам", {"politeness": 1, "hedge": 1, "deference": 2}),
        ("Я думаю, мне это нравится", {"hedge": 1, "first_person": 2}),
        ("", {}),
    ],
)
def test_markers(text, expected):
    found = style_markers(text).counts
    wanted = dict.fromkeys(MARKERS, 0) | expected
    assert found == wanted


def test_words_are_counted_in_any_script():
    assert style_markers("Don't – it's 3 well-made сөз құрметпен!").words == 5
    assert style_markers("12 + 30 = 42").words == 0
