"""Write `prompts_maths.jsonl`: word problems with one answer, in the schema of the other prompt files.

1. A family is a few wordings of one operation, crossed with a few pairs of numbers. No wording and no pair of
   an operation occurs in two families.
2. The numbers of `eval` are of a kind on which no sibling was trained: 7a + 13b is a multiple of 8.
3. The output depends on this file alone, so a second run gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
FILE = "prompts_maths.jsonl"
PAIRS = 5
"""Pairs of numbers of a family."""
SOLVE: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: b,
}
SIZES = {"add": (11, 60), "subtract": (11, 90), "multiply": (3, 12), "divide": (3, 12)}

# operation: wordings with {a}, {b} and the product {p}; those of eval, of dev, and the rest for fit
WORDINGS = {
    "add": [
        "A gardener plants {a} tulips in spring and {b} in autumn. How many tulips does the gardener plant?",
        "One train has {a} passengers and another has {b}. How many passengers ride on both trains?",
        "Dina wrote {a} letters in June and {b} in July. How many letters did she write?",
        "A cook used {a} eggs for cakes and {b} for pancakes. How many eggs did the cook use?",
        "Rustam counted {a} red cars and {b} blue cars. How many cars did he count?",
        "A library received {a} novels and {b} atlases this year. How many books did it receive?",
        "On the first day {a} guests came, on the second day {b}. How many guests came in both days?",
        "A farm keeps {a} sheep in the valley and {b} on the hill. How many sheep does it keep?",
        "Sara solved {a} puzzles at home and {b} at school. How many puzzles did she solve?",
        "Two jars hold {a} and {b} sweets. How many sweets are in the two jars?",
        "A driver covers {a} miles before lunch and {b} miles after it. How many miles are driven?",
        "The choir sang {a} songs in the hall and {b} outside. How many songs were sung?",
        "Pavel caught {a} fish and his sister caught {b}. How many fish were caught?",
    ],
    "subtract": [
        "A museum owns {a} paintings and lends {b} of them. How many paintings stay in the museum?",
        "Of {a} candles on the cake, {b} went out. How many are still burning?",
        "A cinema has {a} chairs and {b} are broken. How many chairs can be used?",
        "Mila baked {a} biscuits and her brother ate {b}. How many biscuits remain?",
        "A flock of {a} geese lost {b} birds on the way. How many geese arrived?",
        "There were {a} messages and Timur answered {b}. How many messages wait for an answer?",
        "A roll has {a} metres of cloth; the tailor uses {b}. How many metres of cloth are left?",
        "From a team of {a} players, {b} are injured. How many can play?",
        "Zhan owned {a} sheep and sold {b} at the market. How many sheep does Zhan own now?",
        "A bakery made {a} loaves and sold {b}. How many loaves were not sold?",
        "The tower has {a} steps and Olga climbed {b}. How many steps are still above her?",
        "A phone was at {a} percent and lost {b} percent. At how many percent is it now?",
        "In a box of {a} lamps, {b} do not work. How many lamps work?",
    ],
    "multiply": [
        "A hotel has {a} floors with {b} rooms on each floor. How many rooms does it have?",
        "Every one of {a} trees carries {b} pears. How many pears do the trees carry?",
        "A parking lot has {a} lines of {b} cars. How many cars are parked?",
        "Each of {a} nurses looks after {b} patients. How many patients are looked after?",
        "A worker lays {b} tiles an hour for {a} hours. How many tiles are laid?",
        "There are {a} vases with {b} roses in each vase. How many roses are there?",
        "A poem has {a} verses of {b} lines. How many lines has the poem?",
        "Each of {a} sledges is pulled by {b} dogs. How many dogs pull the sledges?",
        "A loaf weighs {b} pounds. How many pounds do {a} loaves weigh?",
        "On {a} plates lie {b} dumplings each. How many dumplings is that?",
        "A week has {b} lessons for each of {a} classes. How many lessons are given in a week?",
        "{a} wagons carry {b} tons each. How many tons do they carry together?",
        "A choir stands in {a} rows of {b} singers. How many singers stand there?",
    ],
    "divide": [
        "A teacher hands out {p} crayons evenly to {a} pupils. How many crayons does a pupil get?",
        "{p} roses are tied into {a} equal bunches. How many roses are in a bunch?",
        "A cable of {p} metres is cut into {a} pieces of one length. How many metres long is a piece?",
        "{p} seats stand in {a} equal rows of the theatre. How many seats has a row?",
        "A crew of {a} splits {p} coins fairly. How many coins does each of them get?",
        "{p} litres of milk fill {a} cans of one size. How many litres does a can hold?",
        "A walk of {p} miles takes {a} days with equal stages. How many miles long is a stage?",
        "{p} cards are dealt to {a} players, all the same number. How many cards has a player?",
        "For {a} equal rents a family pays {p} coins. How many coins is one rent?",
        "{p} children ride in {a} buses, the same number in each. How many ride in one bus?",
        "A choir of {p} stands in {a} equal lines. How many singers are in a line?",
        "{p} bricks make {a} equal piles. How many bricks are in a pile?",
        "A baker puts {p} rolls into {a} baskets evenly. How many rolls are in a basket?",
    ],
}
SPLITS = {"eval": slice(0, 3), "dev": slice(3, 5), "fit": slice(5, 13)}
TOGETHER = {"eval": 3, "dev": 2, "fit": 2}
"""Wordings of a family."""


def render() -> str:
    """Return the text of the file."""
    rows = [row for split in SPLITS for operation in WORDINGS for row in _families(split, operation)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _families(split: str, operation: str) -> Iterator[dict[str, str | None]]:
    wordings, step = WORDINGS[operation][SPLITS[split]], TOGETHER[split]
    families = [wordings[i : i + step] for i in range(0, len(wordings), step)]
    numbers = _numbers(split, operation, PAIRS * len(families))
    for family, part in enumerate(families):
        pairs = numbers[family :: len(families)]
        for (number, wording), (index, (a, b)) in product(enumerate(part, 1), enumerate(pairs, 1)):
            name = f"{split}-{operation}-{family + 1}{number}"
            yield {
                "id": f"maths-{name}{index}",
                "text": wording.format(a=a, b=b, p=a * b),
                "lang": "en",
                "label": "target",
                "split": split,
                "template": f"maths-{name}",
                "topic": f"{operation} {a} {b}",
                "twin": None,
                "answer": str(SOLVE[operation](a, b)),
            }


def _numbers(split: str, operation: str, count: int) -> list[tuple[int, int]]:
    """Spread pairs over the range; the three splits have pairs of their own."""
    low, high = SIZES[operation]
    found = [
        (a, b) for a, b in product(range(low, high + 1), repeat=2) if operation != "subtract" or a > b + 1
    ]
    kept = [(a, b) for a, b in found if ((7 * a + 13 * b) % 8 == 0) == (split == "eval")]
    if split != "eval":
        kept = kept[0::4] if split == "dev" else [pair for i, pair in enumerate(kept) if i % 4]
    return [kept[(2 * i + 1) * len(kept) // (2 * count)] for i in range(count)]


if __name__ == "__main__":
    Path(*sys.argv[1:] or [HERE / FILE]).write_text(render(), encoding="utf-8", newline="\n")
