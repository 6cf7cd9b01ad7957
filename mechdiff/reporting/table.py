"""Sum up a run in tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from mechdiff.errors import ConfigError
from mechdiff.reporting.behaviour import BEHAVIOURS, GUESSES, behaviours
from mechdiff.reporting.cells import counts, find, layer, pair_name, positions_of, sites_of
from mechdiff.reporting.divergence import DIRECTIONS, MODELS, curve
from mechdiff.reporting.head_churn import ONE_SIBLING, label_of, rules_of
from mechdiff.reporting.steering import handle_site
from mechdiff.results import Record, Results, is_own

HEAD_NUMBERS = {
    "topk_overlap": "overlap of the highest heads",
    "rbo": "rank-biased overlap",
    "concentration": "heads that hold a share of the change",
    "cpr": "CPR, area under the cumulative curve",
    "cmd": "CMD, its distance from 1",
    "truth_r": "estimate against exact effect, r",
    "churn_difference": "difference of two pairs",
}
"""What is said of heads below their table."""

_EDITS = ("interchange", "mapped", "amplify", "add", "ablate", "reverse")
_RECOVERY = ("interchange_recovery", "ablate_effect")
_GRADED = ("refusal_logodds", "logprob_correct")
SHOWN = ("r2", "r2_delta", "cka_debiased", "kl_raw", "kl_mapped")


def tables(results: Results) -> list[Table]:
    """Build the tables that a run has records for.

    Args:
        results: Table of a run.

    Raises:
        ConfigError: If it holds nothing that is shown.
    """
    questions = {r.question for r in results}
    found = [layer_table(results), behaviour_table(results)] if "rq1" in questions else []
    found += [handle_table(results)] if "rq3" in questions else []
    found += [head_table(results)] if "rq4" in questions else []
    shown = [table for table in found if table.row_count]
    if "rq2" in questions or not questions:
        shown.append(summary(results))
    return shown


def layer_table(results: Results) -> Table:
    """Build the table of divergence and layer patches: one row per site, proposed ones with a star."""
    table = _table(pair_name(results))
    table.add_column("site", no_wrap=True)
    for heading in (
        "divergence\n(debiased)",
        "within class\nand language",
        "base → tuned\nrecovery, last",
        "\nall",
        "tuned → base\nrecovery, last",
        "\nall",
    ):
        table.add_column(heading, justify="right")
    plain, centred = ({r.site: r for r in curve(results, "cka_debiased", c)} for c in (False, True))
    patches = {
        (r.site, r.params["direction"], r.positions): r
        for r in results.select(quantity="patch_recovery", control="none", model="pair", prompts="curve")
    }
    chosen = {r.site for r in results.select(quantity="chosen_layer", by="cka_debiased")}
    sites = {r for r in plain if r} | {site for site, *_ in patches if site}
    for site in sorted(sites, key=layer):
        row = [_away(cells.get(site)) for cells in (plain, centred)]
        row += [_cell(patches.get((site, d, p)), ".2f") for d in DIRECTIONS for p in ("last", "all")]
        table.add_row(f"{site} *" if site in chosen else site, *row)
    lines = ["[ ]: 95 % interval over prompts. Divergence is 1 − CKA. * proposed."]
    for r in results.select(quantity="patch_onset", model="pair"):
        where = f"layer {r.value:.0f}" if r.value is not None else str(r.reason).replace("_", " ")
        lines.append(f"onset, {DIRECTIONS[r.params['direction']].lower()}, {r.positions}: {where}")
    if any("rankings_disagree" in r.flags for r in results.select(quantity="chosen_layer")):
        lines.append("Divergence and recovery rank the layers differently.")
    if results.select(quantity="patch_recovery", reason="unequal_widths"):
        lines.append("No layer is patched: the widths differ.")
    table.caption = "\n".join(lines)
    return table


def behaviour_table(results: Results) -> Table:
    """Build the table of behaviours: one row per quantity and cell, one column per model."""
    table = _table("")
    for heading in ("behaviour", "cell"):
        table.add_column(heading, no_wrap=True)
    models = [m for m in MODELS if results.select(quantity="refusal_rate", model=m)]
    for heading in models:
        table.add_column(heading, justify="right")
    for quantity in BEHAVIOURS:
        for control in ("none", *GUESSES):
            for name, cell in behaviours(results, quantity, control).items():
                shown = name if control == "none" else f"{name} ({control.replace('_', ' ')})"
                numbers = (_number(cell.get(model), ".2f") for model in models)
                table.add_row(quantity.replace("_", " "), shown, *numbers)
    return table


def head_table(results: Results) -> Table:
    """Build the table of heads that changed: one row per rule, with its nulls."""
    table = _table(pair_name(results))
    table.add_column("heads that changed, by rule", no_wrap=True)
    for heading in ("share", "labels\nswapped", "halves of\nbase", "halves of\ntuned"):
        table.add_column(heading, justify="right")
    nulls = [("label_swap", "pair"), ("split_half", "base"), ("split_half", "tuned")]
    for name, cells in rules_of(results).items():
        by = {(r.control, r.model): r for r in cells}
        label = label_of(name, cells).replace("\n", " ")
        row = [_number(by[key], ".3f") if key in by else "" for key in nulls]
        table.add_row(label, _cell(by.get(("none", "pair")), ".3f"), *row)
    lines = ["[ ]: 95 % interval over prompts. Nulls: mean over draws."]
    for quantity, said in HEAD_NUMBERS.items():
        for r in results.select(question="rq4", quantity=quantity, control="none"):
            if r.params.get("group", "all") == "all" and r.value is not None and "of" not in r.params:
                cell = " ".join(f"{k} = {r.params[k]}" for k in ("k", "share") if k in r.params)
                place = f"{r.model}, {r.params['baseline']}" if quantity.startswith("truth") else cell
                lines.append(f"{said}{f' ({place})' if place else ''}: {_flat(r)}")
    if table.row_count and any("grows_with_n" in r.flags for r in results.select(quantity="churn")):
        lines.append("† the share by |z| grows with the number of prompts")
    if any("one_sibling_per_class" in r.flags for r in results.select(quantity="churn_difference")):
        lines.append(ONE_SIBLING)
    table.caption = "\n".join(lines)
    return table


def handle_table(results: Results) -> Table:
    """Build the table of tested handles: one row per edit and rank at the site that was tested."""
    table, site = _table(pair_name(results)), handle_site(results)
    table.title = f"{pair_name(results)}, {site}"
    for heading in ("edit", "k", "α"):
        table.add_column(heading, no_wrap=True)
    headings = ("recovery", "behaviour", "costs: bits\nper byte (%)", "answers that\nturn (pp)", "away")
    for heading in headings:
        table.add_column(heading, justify="right")
    here = [r for r in results.select(question="rq3", site=site, split="eval", control="none") if is_own(r)]
    cells: dict[tuple[str, int], dict[str, Record]] = {}
    for r in here:
        key = (str(r.params.get("edit")), int(r.params.get("k") or 0))
        if r.params.get("alpha", 0) is None or "alpha" in r.params:
            metric = str(r.params.get("metric", "recovery"))
            name = "recovery" if r.quantity in _RECOVERY and metric == "recovery" else r.quantity
            name = "behaviour" if metric in _GRADED else "answers" if metric == "generated" else name
            cells.setdefault(key, {})[name] = r
    for (edit, k), found in cells.items():
        if edit not in _EDITS or "recovery" not in found:
            continue
        alpha = found["recovery"].params.get("alpha")
        costs = [_bounded(found.get(q), f) for q, f in (("side_effect_bpb", 100.0), ("side_effect_pp", 1.0))]
        row = [_cell(found["recovery"], ".2f"), _cell(found.get("behaviour"), ".2f"), *costs]
        row.append(_number(found.get("wrong_way"), ".2f"))
        table.add_row(edit, str(k), "–" if alpha is None else f"{alpha:g}", *row)
    lines = [
        "[ ]: 95 % interval over prompts; ≤: one-sided bound. Away: share of prompts moved the wrong way."
    ]
    for r in results.select(question="rq3", site=site, control="random", quantity="interchange_recovery"):
        if r.params.get("edit", "interchange") != "interchange":
            continue
        if r.high is not None:
            said = f"{r.params['draw']}, k = {r.params['k']}"
            lines.append(f"random subspaces ({said}): 95 % recover {_signed(r.high, '.2f')} or less")
    for quantity in ("minimal_k_10", "minimal_k_20", "minimal_k_90"):
        for r in results.select(question="rq3", quantity=quantity, site=site):
            small = str(r.reason).replace("_", " ") if r.value is None else f"{r.value:g}"
            lines.append(
                f"{quantity.replace('_', ' ')} ({r.params.get('edit') or r.params.get('solver')}): {small}"
            )
    if flags := sorted({flag for r in here for flag in r.flags if r.quantity in _RECOVERY}):
        lines.append(f"† {', '.join(flags).replace('_', ' ')}")
    table.caption = "\n".join(lines)
    return table


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
    table = _table(pair_name(results))
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


def _table(title: str) -> Table:
    return Table(
        title=title or None,
        box=None,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )


def _away(record: Record | None) -> str:
    """Write 1 − CKA."""
    if record is None or record.value is None or record.low is None or record.high is None:
        return _number(record, ".3f")
    ends = f"{_signed(1 - record.high, '.3f')}, {_signed(1 - record.low, '.3f')}"
    return f"{_signed(1 - record.value, '.3f')}\n\\[{ends}]"


def _number(record: Record | None, form: str) -> str:
    if record is None:
        return "–"
    if record.value is None:
        return str(record.reason).replace("_", " ")
    return _signed(record.value, form) + ("†" if record.flags else "")


def _bounded(record: Record | None, scale: float) -> str:
    """Write a cost and the bound above it."""
    if record is None or record.value is None or record.high is None:
        return _number(record, ".1f")
    return f"{_signed(scale * record.value, '.1f')}\n≤ {_signed(scale * record.high, '.1f')}"


def _cell(record: Record | None, form: str) -> str:
    text = _number(record, form)
    if record is None or record.low is None or record.high is None:
        return text
    return f"{text}\n\\[{_signed(record.low, form)}, {_signed(record.high, form)}]"


def _flat(record: Record) -> str:
    form = ".0f" if record.unit == "heads" else ".2f"
    return _cell(record, form).replace("\n", " ").replace("†", "")


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def _caption(results: Results, flags: set[str]) -> str:
    lines = [
        "[ ]: 95 % interval over prompts. The identity map has R² of the difference 0.",
        "CKA is debiased.",
    ]
    lines += [
        f"n = {behind} ({label})"
        for q, label in (("r2_delta", "map"), ("kl_raw", "patch"))
        if (behind := counts(results, q))
    ]
    if flags:
        lines.append(f"† {', '.join(sorted(flags)).replace('_', ' ')}")
    return "\n".join(lines)
