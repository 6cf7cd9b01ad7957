"""Sum up a run in a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from mechdiff.errors import ConfigError
from mechdiff.reporting.cells import counts, find, pair_name, positions_of, sites_of
from mechdiff.results import Record, Results

SHOWN = ("r2", "r2_delta", "cka", "kl_raw", "kl_mapped")


def summary(results: Results) -> Table:
    """Build the table of a map run: one row per site and group of positions.

    Intervals stand below the numbers. A number with a warning carries a dagger; the warnings stand below the
    table.

    Args:
        results: Table of a map run.

    Raises:
        ConfigError: If it holds none of the quantities shown.
    """
    sites, groups = sites_of(results, SHOWN), positions_of(results, SHOWN)
    if not (sites and groups):
        raise ConfigError(
            f"nothing to show: no record of {' or '.join(SHOWN)}; give the results.json of a map run"
        )
    table = Table(
        title=pair_name(results) or None,
        box=None,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("site", no_wrap=True)
    table.add_column("position", no_wrap=True)
    for heading in ("R²", "R² of the\ndifference", "CKA", "KL raw →\n(nats)", "mapped\n(nats)"):
        table.add_column(heading, justify="right")
    flags: set[str] = set()
    for site in sites:
        for group in groups:
            records = [find(results, quantity, site, group) for quantity in SHOWN]
            if not any(records):
                continue
            flags.update(flag for record in records if record for flag in record.flags)
            r2, delta, cka, raw, mapped = records
            texts = [
                _number(r2, ".4f"),
                _cell(delta, ".2f"),
                _number(cka, ".2f"),
                _cell(raw, ".2g"),
                _cell(mapped, ".2g"),
            ]
            table.add_row(site, group, *texts, end_section=group == groups[-1])
    table.caption = _caption(results, flags)
    return table


def _number(record: Record | None, form: str) -> str:
    if record is None:
        return "–"
    if record.value is None:
        return str(record.reason).replace("_", " ")
    return _signed(record.value, form) + ("†" if record.flags else "")


def _cell(record: Record | None, form: str) -> str:
    text = _number(record, form)
    if record is None or record.low is None or record.high is None:
        return text
    return f"{text}\n\\[{_signed(record.low, form)}, {_signed(record.high, form)}]"


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def _caption(results: Results, flags: set[str]) -> str:
    lines = ["[ ]: 95 % interval over prompts. The identity map has R² of the difference 0."]
    lines += [
        f"n = {behind} ({label})"
        for q, label in (("r2_delta", "map"), ("kl_raw", "patch"))
        if (behind := counts(results, q))
    ]
    if flags:
        lines.append(f"† {', '.join(sorted(flags)).replace('_', ' ')}")
    return "\n".join(lines)
