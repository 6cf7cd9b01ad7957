"""Write a report as one HTML page that opens from disk, and as Markdown.

The page loads nothing: style and script are inside it, and its security policy allows them by their hash.
Everything from the records is escaped, in Markdown too; the charts are markup, and escape what they hold.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import mechdiff
from mechdiff.files import write_text
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.report import handle, heads, limits, maps, setup, summary, where
from mechdiff.reporting.report.content import Citations, Number, Section, Text, describe, interval, shown
from mechdiff.reporting.report.runs import Study, read_study
from mechdiff.reporting.report.verdict import words
from mechdiff.reporting.report.view import View
from mechdiff.results import Record

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
"""What a reader of Markdown may take for HTML; the Markdown itself has none."""
NAMES = ("report.html", "report.md")
OBJECTIVE = (
    "Establish an actionable, tokenizer-robust, low-rank causal handle on what tuning changed, and "
    "say with controls "
    "where the change enters, whether a linear map carries it, how small the handle is, and which "
    "heads changed."
)


def write_report(places: Sequence[str | Path], out: str | Path, figures: bool = True) -> list[Path]:
    """Draw a report from records alone.

    Args:
        places: Tables of results, folders of runs, or the folder of a study.
        out: Folder that receives ``report.html`` and ``report.md``.
        figures: Append every figure that the records allow.

    Returns:
        The files written.

    Raises:
        ConfigError: If there is no table, or one cannot be read.
    """
    study = read_study(places, out)
    context = _context(study, figures)
    environment = Environment(
        loader=PackageLoader("mechdiff.reporting.report"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "cell": lambda parts: plain(parts).replace("|", "¦")}
    environment.tests["number"] = lambda part: isinstance(part, Number)
    written = []
    for name in NAMES:
        path = Path(out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = environment.get_template(name).render(context)
        write_text(path, text if name.endswith(".html") else _TAG.sub("&lt;", text))
        written.append(path)
    return written


def sections(study: Study, views: Sequence[View]) -> list[Section]:
    """Write the sections of a report, in order."""
    found = [summary.summary(study, views)]
    found.append(Section("objective", "Objective", [OBJECTIVE]))
    found.append(setup.setup(views))
    for question, part in (("rq1", where), ("rq2", maps), ("rq3", handle), ("rq4", heads)):
        section = part.section(views)
        gone = [v.name for v in views if not v.has(question)]
        if gone:
            section.blocks.append(
                Text([f"Not measured for {' and '.join(gone)}: no {question} run was given."])
            )
        found.append(section)
    if len(views) > 1:
        found.append(summary.contrast(study, views))
    return [
        *found,
        limits.robustness(views),
        limits.limitations(study, views),
        limits.reuse(views),
        setup.provenance(views),
    ]


def plain(parts: Sequence[str | Number]) -> str:
    """Write parts as text, numbers with their interval."""
    return "".join(
        part
        if isinstance(part, str)
        else " ".join(filter(None, [part.text, part.interval if part.full else ""]))
        for part in parts
    )


def _context(study: Study, figures: bool) -> dict[str, Any]:
    cite = Citations()
    views = [View(pair, cite) for pair in study.pairs]
    written = sections(study, views)
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    hashes = {"style": _hash(style), "script": _hash(script)}
    return {
        "title": summary.title(study),
        "pairs": [pair.name for pair in study.pairs],
        "quick": study.quick,
        "missing": summary.missing(study),
        "sections": written,
        "references": setup.REFERENCES,
        "records": [_row(s.anchor, s.pair, s.file, s.record) for s in cite.sources.values()],
        "figures": list(_figures(study)) if figures else [],
        "version": mechdiff.__version__,
        "style": style,
        "script": script,
        "hashes": hashes,
    }


def _row(anchor: str, pair: str, file: str, r: Record) -> dict[str, Any]:
    params = ", ".join(f"{k} {v}" for k, v in r.params.items() if v is not None)
    value = words(r.reason) if r.value is None else shown(r, r.value)
    where_ = " ".join(filter(None, [r.site, r.positions])) or "–"
    return {
        "anchor": anchor,
        "cells": [
            pair,
            r.question,
            words(r.quantity),
            where_,
            r.model,
            words(r.control),
            params or "–",
            value,
        ],
        "interval": interval(r) or "none",
        "n": f"{r.n:,}",
        "flags": ", ".join(map(words, r.flags)) or "–",
        "file": file,
        "says": describe(pair, r),
    }


def _figures(study: Study) -> Iterator[dict[str, str]]:
    """Draw every figure that the records allow, as bitmaps."""
    for pair in study.pairs:
        for run in pair.runs.values():
            for name, _, plot in drawable(run.results):
                picture = BytesIO()
                plot(run.results).savefig(picture, format="png", dpi=110)
                data = base64.b64encode(picture.getvalue()).decode("ascii")
                yield {"title": f"{pair.name}, {run.question}: {words(name)}", "data": data}


def _asset(name: str) -> str:
    return files("mechdiff.reporting.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """Return the hash by which a security policy allows one piece of style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
