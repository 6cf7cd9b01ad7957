"""Write a calibration for readers: what is found, also where nothing is, and how many prompts it takes.

``calibration.json`` → ``calibration.md`` and the figures beside it. Every share stands with its trials, its
exact interval and what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mechdiff.calibration.cells import FILE, Calibration, Cell, prompts_needed, read_calibration
from mechdiff.calibration.figures import (
    POWER,
    coverage_cells,
    plot_coverage,
    plot_power,
    plot_recall,
    plot_strength,
    power_cells,
    recall_cells,
    strength_cells,
)
from mechdiff.errors import ConfigError
from mechdiff.files import write_text

PAGE = "calibration.md"
Cells = Sequence[Cell]
FIGURES: dict[str, tuple[str, Callable[[Cells], Cells], Callable[[Cells, Path], Figure]]] = {
    "recall": ("calibration_recall.png", recall_cells, plot_recall),
    "strength": ("calibration_strength.png", strength_cells, plot_strength),
    "coverage": ("calibration_coverage.png", coverage_cells, plot_coverage),
    "power": ("calibration_power.png", power_cells, plot_power),
}
"""Name of each figure, what is drawn, and how."""
INTERVALS = "intervals"
"""What is not one question's own."""
POOL = "pool"
"""Where the prompts of the intervals come from, in the provenance."""
PLANTED = (
    "Planted: `policy_r`, r topics that each write a direction of their own at one block; `block` and "
    "`spread`, noise in the weights of one block, or of five; `flip`, `rotate`, `query` and `key`, three "
    "heads whose output or attention is changed; `relay`, a block that writes what a later one acts on. "
    "Nulls: `copy`; `bf16`, weights rounded; `vocabulary`, permuted ids and new tokens; `swapped`, model "
    "labels swapped by prompt; `halves` of one model's prompts. A difference of `clear nats` or more is "
    "clearly measurable; of one in several blocks, those are asked for that move a model by 5 % of it by "
    "themselves."
)


def write(folder: str | Path, figures: str = ".") -> list[Path]:
    """Write the page and the figures of a calibration.

    Args:
        folder: Holds ``calibration.json``.
        figures: Folder of the figures, from there.

    Returns:
        What was written.

    Raises:
        ConfigError: If the table is missing, malformed or empty.
    """
    folder = Path(folder)
    table = read_calibration(folder)
    cells = table.cells
    if not cells:
        raise ConfigError(f"{folder / FILE} holds no cell; run mechdiff calibrate")
    drawn = {}
    for figure, (name, picked, plot) in FIGURES.items():
        if picked(cells):
            plot(cells, folder / figures / name)
            drawn[figure] = f"{figures}/{name}".removeprefix("./")
    page = folder / PAGE
    write_text(page, "\n".join(_page(table, drawn)) + "\n")
    return [page, *(folder / name for name in drawn.values())]


def how_many_prompts(cells: Iterable[Cell], power: float = POWER) -> list[tuple[Cell, int | None]]:
    """Answer how many prompts it takes to find differences of each kind and strength.

    Args:
        cells: A table of calibration.
        power: Share of differences that shall be found.

    Returns:
        A cell of each method, kind and strength that stands for all its numbers of prompts, that with most of
        them, and the least number of prompts with this power; None where it takes more than were tried.
    """
    lines: dict[tuple[Any, ...], list[Cell]] = {}
    for c in cells:
        if c.group == "power":
            lines.setdefault((c.question, c.quantity, c.method, c.kind, c.strength), []).append(c)
    return [(max(line, key=lambda c: c.prompts), prompts_needed(line, power)) for line in lines.values()]


def _page(table: Calibration, drawn: dict[str, str]) -> Iterator[str]:
    cells = table.cells
    yield from ("# Calibration", "")
    yield (
        "What the methods find of differences whose answer is known, and how often they find something where "
        "nothing is. Brackets: exact binomial 95 % interval of the share over trials. **Missed**: neither "
        "the share nor its interval reaches what was asked for; *within error*: the interval does."
    )
    yield from ("", *_provenance(table.provenance), "")
    yield from _summary(cells)
    questions = [q for q in dict.fromkeys(sorted(c.question for c in cells)) if q != INTERVALS]
    for question in questions:
        own = [c for c in cells if c.question == question]
        yield from (f"## {question.upper()}", "")
        yield from _shares("What was planted and is found", [c for c in own if c.group == "recall"])
        yield from _shares("Where nothing is", [c for c in own if c.group == "false_positives"])
        yield from _matrix("Coverage of its intervals", [c for c in own if c.group == "coverage"])
        yield from _shares("Power", [c for c in own if c.group == "power"])
        yield from _numbers([n for n in table.numbers if n["question"] == question])
    if "recall" in drawn:
        yield from (f"![Recall by strength]({drawn['recall']})", "")
    if "strength" in drawn:
        yield from (f"![Power by strength]({drawn['strength']})", "")
    rest = [c for c in cells if c.question == INTERVALS]
    if rest:
        yield from ("## Intervals", "")
        yield (
            "Samples of n prompts from one pool of prompts that were run once; the pool's own value is the "
            "truth. No model is run."
        )
        yield ""
        yield from _matrix("Intervals that hold the truth", rest)
    if "coverage" in drawn:
        yield from (f"![Coverage of intervals]({drawn['coverage']})", "")
    yield from _needed(cells)
    if "power" in drawn:
        yield from (f"![Power by number of prompts]({drawn['power']})", "")
    yield from _notes(cells)


def _provenance(provenance: dict[str, Any]) -> list[str]:
    said = []
    for name, value in provenance.items():
        parts = [f"{a} {b}" for a, b in value.items()] if isinstance(value, dict) else value
        text = ", ".join(map(str, parts)) if isinstance(parts, list) else str(parts)
        said.append(f"{name.replace('_', ' ')}: `{text}`")
    return [" · ".join(said)] if said else []


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    """Put what was asked for first, over all kinds; then how the cells of single kinds did."""
    over = [c for c in cells if c.kind.startswith("any ") and c.wanted is not None]
    if over:
        yield from (PLANTED, "", "## What was asked for", "")
        yield (
            "`any planted`: all clearly measurable differences; `any null`: all that are none. Of churn "
            "each head is a trial."
        )
        yield ""
        yield from _rows([c for c in over if c.group == "recall"])
        yield from _rows([c for c in over if c.group != "recall"])
    rows = []
    for question, group in dict.fromkeys(sorted((c.question, c.group) for c in cells)):
        asked = [
            c for c in cells if (c.question, c.group) == (question, group) and c.verdict and c not in over
        ]
        if asked:
            counts = [sum(c.verdict == v for c in asked) for v in ("met", "within error", "missed")]
            trials = sum(c.trials for c in asked)
            rows.append([_named(question), group.replace("_", " "), f"{trials:,}", *map(str, counts)])
    if rows:
        yield from ("## Kind by kind", "", "How many cells of single kinds of differences do so.", "")
        heading = ["question", "what", "trials", "cells that meet the target", "within error", "missed"]
        yield from _table(heading, rows, numbers=2)


def _shares(title: str, cells: Sequence[Cell]) -> Iterator[str]:
    if not cells:
        return
    yield from (f"### {title}", "")
    yield from _rows([c for c in cells if c.strength is None])
    yield from _strengths([c for c in cells if c.strength is not None])


def _strengths(cells: Sequence[Cell]) -> Iterator[str]:
    """Lay out cells that differ in strength as one row each."""
    if not cells:
        return
    strengths = sorted({c.strength for c in cells if c.strength is not None})
    lines: dict[tuple[str, ...], dict[float | None, Cell]] = {}
    for c in cells:
        key = (c.quantity.replace("_", " "), c.method, c.kind, f"{c.prompts}", _target(c))
        lines.setdefault(key, {})[c.strength] = c
    yield from ("By strength, share in %, whether clearly measurable or not.", "")
    rows = [
        [
            *key,
            *(
                f"{line[s].successes}/{line[s].trials}: {_share(line[s])}" if s in line else ""
                for s in strengths
            ),
        ]
        for key, line in lines.items()
    ]
    heading = ["quantity", "method", "on", "prompts", "target (%)", *(f"{s:g}" for s in strengths)]
    yield from _table(heading, rows, numbers=3)


def _rows(cells: Sequence[Cell]) -> Iterator[str]:
    if not cells:
        return
    rows = [
        [
            _named(c.question),
            c.quantity.replace("_", " "),
            c.method,
            c.kind,
            "" if c.strength is None else f"{c.strength:g}",
            str(c.prompts),
            f"{c.successes:,}/{c.trials:,}",
            _share(c),
            _target(c),
            _said(c),
        ]
        for c in sorted(cells, key=lambda c: c.wanted is None)  # what something is asked of comes first
    ]
    heading = ["", "quantity", "method", "on", "strength", "prompts", "count", "share (%)", "target (%)", ""]
    yield from _table(heading, rows, numbers=4)


def _numbers(numbers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """List what is no share."""
    if not numbers:
        return
    yield from ("### Numbers beside them", "", "Median over cases, quartiles in brackets.", "")
    rows = [
        [
            n["quantity"].replace("_", " "),
            n["method"],
            n["kind"],
            "" if n["strength"] is None else f"{n['strength']:g}",
            f"{n['prompts']}",
            f"{n['n']}",
            f"{n['median']:.3g} [{n['quartiles'][0]:.3g}, {n['quartiles'][1]:.3g}]",
            n["unit"],
        ]
        for n in numbers
    ]
    heading = ["quantity", "method", "on", "strength", "prompts", "cases", "median", "unit"]
    yield from _table(heading, rows, numbers=3)


def _matrix(title: str, cells: Sequence[Cell]) -> Iterator[str]:
    """Lay out cells that differ in the number of prompts as one row each."""
    if not cells:
        return
    sizes = sorted({c.prompts for c in cells})
    lines: dict[tuple[str, ...], dict[int, Cell]] = {}
    for c in cells:
        strength = "" if c.strength is None else f"{c.strength:g}"
        lines.setdefault((c.method, c.kind, strength, _target(c)), {})[c.prompts] = c
    trials = sorted({c.trials for c in cells})
    counted = f"{trials[0]:,}" if len(trials) == 1 else f"{trials[0]:,} to {trials[-1]:,}"
    yield from (f"### {title}", "", f"Share of {counted} trials in %, by number of prompts.", "")
    marks = {"missed": "**{}**", "within error": "*{}*"}
    rows = []
    for key, line in lines.items():
        shares = {n: marks.get(c.verdict, "{}").format(_share(c)) for n, c in line.items()}
        rows.append([*key, *(shares.get(n, "") for n in sizes)])
    heading = ["method", "on", "strength", "target (%)", *(f"n = {n}" for n in sizes)]
    yield from _table(heading, rows, numbers=4)


def _needed(cells: Sequence[Cell]) -> Iterator[str]:
    tried = [c for c in cells if c.group == "power" and c.strength is not None]
    sizes = Counter((c.question, c.method, c.kind, c.strength) for c in tried)
    found = how_many_prompts([c for c in tried if sizes[c.question, c.method, c.kind, c.strength] > 1])
    if not found:
        return
    yield from ("## How many prompts do I need?", "")
    yield (
        f"The least number of prompts, of those tried, from which on at least {POWER:.0%} of differences are "
        "found."
    )
    yield ""
    rows = [
        [
            _named(c.question),
            c.method,
            c.kind,
            "" if c.strength is None else f"{c.strength:g}",
            f"{n}" if n is not None else f"more than {c.prompts}",
            f"{c.prompts}: {_share(c)}",
        ]
        for c, n in found
    ]
    heading = ["question", "method", "difference", "strength", "prompts", "power with most prompts (%)"]
    yield from _table(heading, rows, numbers=3)


def _notes(cells: Sequence[Cell]) -> Iterator[str]:
    """List what misses its target and why, as far as it is known."""
    missed = [c for c in cells if c.verdict == "missed"]
    if not missed:
        return
    yield from ("## What is missed", "")
    for c in missed:
        strength = "" if c.strength is None else f", strength {c.strength:g}"
        where = f"{c.method} on {c.kind}{strength}, {c.prompts} prompts"
        why = f" {c.note}" if c.note else ""
        what = c.quantity.replace("_", " ")
        yield f"* {_named(c.question)}, {what}: {where}: {_share(c)} %, asked for {_target(c)} %.{why}"
    yield ""


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> Iterator[str]:
    """Yield a table; columns from `numbers` on are set to the right."""
    yield f"| {' | '.join(heading)} |"
    yield f"|{'|'.join('---' if i < numbers else '---:' for i in range(len(heading)))}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _share(c: Cell) -> str:
    return f"{100 * c.estimate:.1f} [{100 * c.low:.1f}, {100 * c.high:.1f}]"


def _target(c: Cell) -> str:
    if c.wanted is None:
        return ""
    least, most = (100 * end for end in c.wanted)
    if most >= 100:
        return f"≥ {least:g}"
    return f"≤ {most:g}" if least <= 0 else f"{least:g}–{most:g}"


def _said(c: Cell) -> str:
    return {"missed": "**missed**", "within error": "*within error*"}.get(c.verdict, c.verdict)


def _named(question: str) -> str:
    return question if question == INTERVALS else question.upper()
