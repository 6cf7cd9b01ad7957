"""Limitations: every flag that a record may carry is told in words."""

from __future__ import annotations

import re
from pathlib import Path

from mechdiff.reporting.report.limits import FLAGS

ROOT = Path(__file__).parents[3]


def test_every_documented_flag_has_words_and_no_other() -> None:
    page = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    table = page.split("## Flags")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} - {"flag"}
    assert named == set(FLAGS)
