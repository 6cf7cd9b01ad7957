"""Keep measurements, one JSON line each, and draw the tables of the README from them.

`python -m benchmarks.results FILE...` appends the lines of other files, such as those that a GPU machine sent
back, to `results.jsonl` and draws the tables anew.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mechdiff

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.jsonl", HERE / "README.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
LIBRARIES = ("torch", "transformers", "lightning", "h5py", "numpy")


def measurement(
    who: str, what: str, figures: Mapping[str, Any], **ratios: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe one measurement.

    Args:
        who: The script.
        what: What was measured.
        figures: Numbers by name, the unit in the name.
        **ratios: What the figures come to, each `{"value": ..., "goal": ...}`; a goal of None is no goal.
    """
    versions = {name: metadata.version(name) for name in LIBRARIES} | {"mechdiff": mechdiff.__version__}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "who": who,
        "what": what,
        "hardware": hardware(),
        "versions": versions | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "figures": dict(figures),
        "ratios": ratios,
    }


def run_parts(parts: Mapping[str, Callable[[], None]], say: Callable[[str], None]) -> list[str]:
    """Run parts one after the other, whatever becomes of those before; return those that failed."""
    failed = []
    for name, part in parts.items():
        begun = time.perf_counter()
        try:
            part()
        except Exception:  # the machine is lent for minutes: the other parts have to be run all the same
            traceback.print_exc()
            failed.append(name)
        say(f"{name} took {time.perf_counter() - begun:.1f} s")
    return failed


def hardware() -> str:
    """Name the devices of this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {torch.get_num_threads()} threads, {platform.machine()}"


def _processor() -> str:
    """Return what Linux calls the processor, else that it is one."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def append(lines: Iterable[Mapping[str, Any]], path: Path = RESULTS) -> None:
    """Append measurements to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all measurements of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: the goals, then for each script one table of its measurements, the newest first."""
    parts = [targets(lines)]
    for who in sorted({line["who"] for line in lines}):
        parts.append(
            f"### {who}\n\n| date | hardware | what | figures | against the goal |\n|---|---|---|---|---|\n"
        )
        own = [line for line in lines if line["who"] == who]
        for line in sorted(own, key=lambda line: line["date"], reverse=True):
            versions = ", ".join(f"{k} {line['versions'][k]}" for k in ("mechdiff", "torch", "transformers"))
            ratios = "; ".join(f"{name} {said(ratio)}" for name, ratio in line["ratios"].items())
            where = f"{line['hardware']} ({versions})"
            cells = (line["date"], where, line["what"], "; ".join(figures(line)), ratios)
            parts.append("| " + " | ".join(cells) + " |\n")
        parts.append("\n")
    return "".join(parts)


def draw(path: Path = README, results: Path = RESULTS) -> None:
    """Put the tables of a file of results between the marks of a README."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{tables(read(results))}{END}{after}", encoding="utf-8")


def figures(line: Mapping[str, Any]) -> list[str]:
    """Write the figures of a line, each with its name."""
    return [f"{name} {_number(value)}" for name, value in line["figures"].items()]


def said(ratio: Mapping[str, Any]) -> str:
    """Write a ratio, the range of its rounds, its goal, and whether that is met, as far as they are known."""
    spread = f" [{_number(ratio['low'])}, {_number(ratio['high'])}]" if "low" in ratio else ""
    verdict = {None: "", True: ", met", False: ", missed"}[met(ratio)]
    goal = "" if ratio.get("goal") is None else f" (goal {_number(ratio['goal'])}{verdict})"
    return f"{_number(ratio['value'])}{spread}{goal}"


def met(ratio: Mapping[str, Any]) -> bool | None:
    """Tell whether a ratio of rounds meets its goal; None where there is no goal."""
    if ratio.get("goal") is None or "low" not in ratio:
        return None
    within: bool = (
        ratio["value"] <= ratio["goal"] if ratio.get("at_most") else ratio["value"] >= ratio["goal"]
    )
    return within


def targets(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: the newest ratio for every goal of `benchmarks.cpu`, then why any is missed."""
    newest = {line["what"]: line for line in lines if line.get("limit") is not None}
    if not newest:
        return ""
    head = "| what | beside | goal | measured | rounds from, to | |\n|---|---|---|---|---|---|\n"
    rows, missed = [], []
    for what, line in newest.items():
        if "not_measured" in line["figures"]:
            rows.append(f"| {what} | | | not measured | | {line['figures']['not_measured']} |\n")
        for name, ratio in line["ratios"].items():
            verdict = met(ratio)
            if verdict is None:
                continue
            sign = "≤" if ratio.get("at_most") else "≥"
            value, low, high, goal = (_number(ratio[key]) for key in ("value", "low", "high", "goal"))
            answer = "met" if verdict else "**missed**"
            beside = name.replace("_", " ")
            rows.append(f"| {what} | {beside} | {sign} {goal} | {value} | {low}, {high} | {answer} |\n")
        short = [name.replace("_", " ") for name, ratio in line["ratios"].items() if met(ratio) is False]
        if short and line["limit"]:
            missed.append(f"* {what} ({', '.join(short)}): {line['limit']}.\n")
    why = "\nWhy a goal is missed:\n\n" + "".join(missed) if missed else ""
    return f"### Goals\n\n{head}{''.join(rows)}{why}\n"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        append(read(Path(name)))
    draw()
