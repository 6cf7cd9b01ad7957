"""Generate arithmetic word problems with one or two operands; the answer is the number alone.

Every ninth wording is held out for development; problems for development also use numbers of which no pair
occurs in training
(a hash of the operands decides).
"""

from __future__ import annotations

from typing import Literal

import torch
from texts import Example, part, pick

Split = Literal["train", "dev"]
NAMES = [
    "Aida",
    "Ben",
    "Clara",
    "Dias",
    "Emma",
    "Farid",
    "Gulnar",
    "Hugo",
    "Ivan",
    "Jana",
    "Karim",
    "Leila",
    "Marat",
    "Nora",
    "Omar",
    "Petra",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "pencils",
    "stamps",
    "marbles",
    "tickets",
    "eggs",
    "cards",
    "shells",
    "stickers",
    "bottles",
    "chairs",
    "buttons",
    "candles",
]
BOXES = ["boxes", "bags", "baskets", "shelves", "rows", "crates", "drawers"]

# operation: sentence patterns with {a}, {b}, a name {n}, a second name {m}, things {o} and containers {c}
TEMPLATES = {
    "add": [
        "How much is {a} plus {b}?",
        "Add {a} and {b}.",
        "{n} picks {a} {o}, {m} picks {b}. How many {o} do they pick in total?",
        "In a class there are {a} girls and {b} boys. How many children are in the class?",
        "What is {b} more than {a}?",
        "{n} has {a} {o} and buys {b} more. How many {o} does {n} have now?",
        "There are {a} {o} on one table and {b} on another. How many {o} are there in all?",
        "{n} found {a} {o} in the morning and {b} in the evening. How many did {n} find?",
        "{n} has {a} {o} and {m} has {b}. How many {o} do they have together?",
        "A shop sold {a} {o} on Monday and {b} on Tuesday. How many {o} were sold?",
        "{n} read {a} pages yesterday and {b} pages today. How many pages is that?",
        "A bus carries {a} people. At the next stop {b} get on. How many people are on the bus?",
        "{n} walked {a} metres and then {b} metres more. How far did {n} walk?",
        "What is {a} plus {b}?",
        "{n} paid {a} dollars for a coat and {b} dollars for shoes. What was the total?",
        "{m} gave {n} {b} {o}. Before that {n} had {a}. How many {o} has {n} now?",
        "The sum of {a} and {b} is what number?",
        "{a} {o} are in the box and {b} lie beside it. Count them all.",
        "{n} scored {a} points, then {b} points. What is the final score?",
        "A baker made {a} rolls before noon and {b} after. How many rolls did the baker make?",
    ],
    "subtract": [
        "{n} has {a} {o} and loses {b} of them. How many {o} does {n} still have?",
        "How much is {a} minus {b}?",
        "{a} people were in the room and {b} went home. How many stayed?",
        "{n} wants to save {a} dollars and has saved {b}. How many dollars are still missing?",
        "Take {b} away from {a}. What is left?",
        "{n} had {a} {o} and gave {b} to {m}. How many {o} are left?",
        "There were {a} {o} in the box. {n} took out {b}. How many remain?",
        "{n} has {a} {o}, {m} has {b}. How many more does {n} have?",
        "A rope is {a} metres long. {b} metres are cut off. How long is the rest?",
        "What is {a} minus {b}?",
        "{n} had {a} dollars and spent {b}. How many dollars are left?",
        "Of {a} seats in the hall, {b} are taken. How many are free?",
        "A book has {a} pages and {n} has read {b}. How many pages are still to read?",
        "{b} of the {a} {o} are broken. How many are whole?",
        "{n} needs {a} {o} and has {b}. How many are missing?",
        "{a} birds sat on a wire and {b} flew away. How many stayed?",
        "The difference between {a} and {b} is what number?",
        "A tank held {a} litres. {b} litres leaked out. How many litres are in it now?",
        "{n} is {a} years old and {m} is {b}. How many years older is {n}?",
    ],
    "multiply": [
        "How much is {a} times {b}?",
        "{n} buys {a} {c} of {o}, each with {b}. How many {o} does {n} buy?",
        "What do you get when you multiply {a} by {b}?",
        "{a} friends each bring {b} {o}. How many {o} do they bring?",
        "{n} has {a} {c} with {b} {o} in each. How many {o} are there?",
        "There are {a} {c} of {b} {o}. How many {o} is that in total?",
        "One ticket costs {b} dollars. How much do {a} tickets cost?",
        "{n} runs {b} kilometres a day. How far is that in {a} days?",
        "What is {a} times {b}?",
        "Each of {a} children gets {b} {o}. How many {o} are needed?",
        "A week plan has {a} tasks a day for {b} days. How many tasks is that?",
        "{n} packs {b} {o} into every one of {a} {c}. How many {o} are packed?",
        "Multiply {a} by {b}.",
        "{a} tables have {b} chairs each. How many chairs are there?",
    ],
    "divide": [
        "Divide {p} by {a}.",
        "How much is {p} divided by {a}?",
        "{n} has {p} {o} and {a} {c}. If every one holds the same number, how many {o} are in each?",
        "{a} friends share {p} {o} equally. How many {o} does each get?",
        "{n} shares {p} {o} equally among {a} friends. How many {o} does each friend get?",
        "{p} {o} go into {a} {c}, the same number in each. How many are in one?",
        "What is {p} divided by {a}?",
        "{a} tickets cost {p} dollars. What does one ticket cost?",
        "A ribbon of {p} metres is cut into {a} equal pieces. How long is a piece?",
        "{n} reads {p} pages in {a} days, the same number every day. How many pages a day?",
        "{p} pupils form {a} equal teams. How many pupils are in a team?",
        "How many times does {a} go into {p}?",
        "{p} {o} are placed in {a} equal rows. How many are in a row?",
    ],
    "single": [
        "What is five more than {a}?|a+5",
        "Write the number that is one less than {a}.|a-1",
        "{m} has {a} {o}. {n} has two times that many. How many {o} has {n}?|2*a",
        "What is twice {a}?|2*a",
        "{n} had {a} {o} and found ten more. How many now?|a+10",
        "{n} has {a} {o}. {m} has twice as many. How many {o} does {m} have?|2*a",
        "What is double {a}?|2*a",
        "What number comes right after {a}?|a+1",
        "What number comes just before {a}?|a-1",
        "{n} is {a} years old. How old will {n} be in ten years?|a+10",
        "{n} has {a} {o} and gets one more. How many is that?|a+1",
        "What is three times {a}?|3*a",
        "A pair is two. How many shoes are in {a} pairs?|2*a",
        "What is ten more than {a}?|a+10",
        "Each hand has five fingers. How many fingers do {a} hands have?|5*a",
        "{n} loses one of {a} {o}. How many are left?|a-1",
        "What is ten times {a}?|10*a",
    ],
}
SINGLE = {
    "2*a": lambda a: 2 * a,
    "a+1": lambda a: a + 1,
    "a-1": lambda a: a - 1,
    "a+10": lambda a: a + 10,
    "a+5": lambda a: a + 5,
    "3*a": lambda a: 3 * a,
    "5*a": lambda a: 5 * a,
    "10*a": lambda a: 10 * a,
}


def solve(lang: str, rng: torch.Generator, split: Split = "train", wordings: Split = "train") -> Example:
    """Draw one problem in English; ``split`` is that of the numbers."""
    while True:
        operation = pick(list(TEMPLATES), rng)
        a, b = _operands(operation, rng)
        if ((7 * a + 13 * b) % 8 == 0) == (split == "dev"):
            break
    template, _, rule = pick(part(TEMPLATES[operation], wordings), rng).partition("|")
    name, mate = pick(NAMES, rng), pick(NAMES, rng)
    while mate == name:
        mate = pick(NAMES, rng)
    text = template.format(a=a, b=b, p=a * b, n=name, m=mate, o=pick(THINGS, rng), c=pick(BOXES, rng))
    answer = {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": b}.get(operation)
    return Example("solve", lang, text, str(SINGLE[rule](a) if answer is None else answer), operation)


def _operands(operation: str, rng: torch.Generator) -> tuple[int, int]:
    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    if operation in ("multiply", "divide"):
        return between(2, 12), between(2, 12)
    if operation == "single":
        return between(2, 40), 0
    high = pick([20, 50, 99], rng)
    a, b = between(2, high), between(2, high)
    if operation == "subtract":
        return (max(a, b) + (a == b), min(a, b))
    return a, b
