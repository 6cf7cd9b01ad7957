"""Count markers of style in a text: hedges, politeness, deference, first person.

1. Words are runs of letters; a marker counts once for every place where one of its patterns matches.
2. English, Kazakh and Russian patterns are all tried: an answer may be in another language than its question.
"""

import re
from typing import NamedTuple

_HEDGE = (
    r"\b(?:perhaps|maybe|possibly|probably|presumably|apparently|arguably|somewhat|might|could be|may be"
    r"|it seems|it appears|seems to|tends? to|I (?:think|believe|guess|suppose)|in my (?:view|opinion))\b",
    r"\b(?:мүмкін|бәлкім|шамасы|сірә|сияқты|секілді|тәрізді|меніңше|менің ойымша|болар|көрінеді)\b",
    r"\b(?:возможно|наверное|наверно|вероятно|пожалуй|видимо|кажется|по-видимому|может быть|как будто"
    r"|на мой взгляд|по-моему|я (?:думаю|полагаю|считаю))\b",
)
_POLITE = (
    r"\b(?:please|thank you|thanks|sorry|excuse me|pardon|forgive me|kindly|you're welcome|apologi[sz]e"
    r"|happy to|glad to|with pleasure|of course|certainly)\b",
    r"\b(?:өтінемін|рақмет|рахмет|кешіріңіз\w*|кешірерсіз|ғафу етіңіз|айып етпеңіз|мархабат|қош келдіңіз"
    r"|әрине|қуана|сәлеметсіз)\b",
    r"\b(?:пожалуйста|спасибо|благодарю|извините|простите|прошу прощения|будьте добры|конечно|разумеется"
    r"|с удовольствием|здравствуйте)\b",
)
_DEFERENCE = (
    r"\b(?:respect(?:s|ed|ful|fully)?|with all due|hono[u]?r(?:s|ed|able|ing)?|elders?|scholars?|sacred"
    r"|humbl[ey]|not my place|defer to|tradition(?:s|al)?|esteemed|dear (?:sir|madam))\b",
    r"\b(?:құрмет\w*|үлкендер\w*|ақсақал\w*|ата-баба\w*|қадірлі|қадірменді|ардақты|қасиетті|киелі|салт-дәстүр\w*"
    r"|дәстүр\w*|ұлық\w*)\b",
    r"\b(?:уважени[еяюем]+|уважаем\w+|почтени[еяюем]+|с почтением|старши[ехм]+|старейшин\w*|священн\w+"
    r"|традици\w+|достопочтенн\w+)\b",
)
_FIRST_PERSON = (
    r"(?-i:\bI\b)|\b(?:me|my|mine|myself)\b",  # "i" alone is a letter
    r"\b(?:мен|маған|мені|менің|менде|менен|өзім|өзімнің)\b",
    r"\b(?:я|меня|мне|мной|мною|мой|моя|моё|мое|мои|моего|моей|моих|моим)\b",
)

_PATTERNS = {
    name: re.compile("|".join(parts), re.IGNORECASE)
    for name, parts in {
        "hedge": _HEDGE,
        "politeness": _POLITE,
        "deference": _DEFERENCE,
        "first_person": _FIRST_PERSON,
    }.items()
}
MARKERS = tuple(_PATTERNS)
"""Names of the markers."""


class Style(NamedTuple):
    """Markers in a text.

    Attributes:
        words: Number of words.
        counts: Number of places of each marker.
    """

    words: int
    counts: dict[str, int]


def style_markers(text: str) -> Style:
    """Count words and markers of style; 100 · count / words is the rate per 100 words.

    >>> style_markers("Perhaps I could help, with respect. Thank you!")
    Style(words=8, counts={'hedge': 1, 'politeness': 1, 'deference': 1, 'first_person': 1})
    >>> style_markers("Кешіріңіз, менің ойымша, бұл мүмкін.").counts["hedge"]
    2
    """
    plain = text.translate({0x2019: "'", 0x2018: "'"})
    counts = {name: sum(1 for _ in pattern.finditer(plain)) for name, pattern in _PATTERNS.items()}
    return Style(len(re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", plain)), counts)
