"""Decline Kazakh noun phrases, so that one list of topics fits sentences in several cases.

Only the last word takes a suffix. Its vowel follows the last vowel of the word (front or back), its consonant
the last sound.
"""

BACK, FRONT = set("аоұыяёуАОҰЫЯ"), set("әөүіеэиӘӨҮІЕЭИ")
VOICELESS = set("пфкқтсшщчцхһбвгд")  # stems that end in б, в, г, д take the voiceless suffix too
NASAL, VOWEL = set("мнң"), set("аәеоөұүыіэяё")
CASES = ("t", "acc", "gen", "dat", "loc", "abl")


def decline(phrase: str) -> dict[str, str]:
    """Return the nominative, accusative, genitive, dative, locative and ablative of a phrase.

    Args:
        phrase: Nominative; a trailing ``+`` says that it ends in a third-person possessive suffix.

    >>> list(decline("мал").values())
    ['мал', 'малды', 'малдың', 'малға', 'малда', 'малдан']
    >>> decline("арғын руы+")["dat"], decline("беташар")["dat"], decline("ас беру")["acc"]
    ('арғын руына', 'беташарға', 'ас беруді')
    >>> decline("шаңырақ")["loc"], decline("Отан")["abl"], decline("Балқаш көлі+")["loc"]
    ('шаңырақта', 'Отаннан', 'Балқаш көлінде')
    """
    possessive, noun = phrase.endswith("+"), phrase.rstrip("+")
    front = _is_front(noun)
    vowel, open_vowel = ("і", "е") if front else ("ы", "а")
    if possessive:
        suffixes = "н", f"н{vowel}ң", f"н{open_vowel}", f"нд{open_vowel}", f"н{open_vowel}н"
    else:
        last = noun[-1].lower()
        if last in VOICELESS:
            dative = "ке" if front else "қа"
            suffixes = f"т{vowel}", f"т{vowel}ң", dative, f"т{open_vowel}", f"т{open_vowel}н"
        else:
            dative = "ге" if front else "ға"
            accusative = f"н{vowel}" if last in VOWEL else f"д{vowel}"
            genitive = f"н{vowel}ң" if last in VOWEL or last in NASAL else f"д{vowel}ң"
            ablative = f"{'н' if last in NASAL else 'д'}{open_vowel}н"
            suffixes = accusative, genitive, dative, f"д{open_vowel}", ablative
    return dict(zip(CASES, (noun, *(noun + s for s in suffixes)), strict=True))


def _is_front(noun: str) -> bool:
    word = noun.split()[-1]
    for letter in reversed(word[:-1] if word[-1] in "ую" else word):  # final у, ю (verbal nouns) are neutral
        if letter in FRONT:
            return True
        if letter in BACK:
            return False
    return False
