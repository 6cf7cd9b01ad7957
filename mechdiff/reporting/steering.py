"""Draw how small a handle may be: its effect and side effects by rank, and dev curves over alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, WIDTH, caption, finish
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.results import Record, Results, is_own

EDITS = {
    "interchange": ("#0072B2", "o", "interchange: tuned's state within the subspace"),
    "mapped": ("#D55E00", "s", "mapped: the state that the linear map predicts"),
    "add": ("#009E73", "D", "add: the difference in means (k = 1)"),
    "amplify": ("#CC79A7", "^", "amplify: the state within the subspace"),
}
"""Colour, marker and meaning of the edits of base."""
DRAWS = {"isotropic": ("#BBBBBB", "any direction"), "covariance": ("#8C8C8C", "where states vary")}
LIMITS = {"side_effect_bpb": 5.0, "side_effect_pp": 5.0}
"""Limits of the side effects, in percent and percentage points."""
_QUANTITIES = {
    "interchange_recovery": ("How much of tuned's next token it restores", "recovery (fraction; 1 = tuned)"),
    "steer_effect": ("How far it moves the {}", "share of the gap (1 = tuned)"),
    "side_effect_bpb": ("Cost on neutral prompts: fluency", "bits per byte (% more)"),
    "side_effect_pp": ("Cost on neutral prompts: answers that turn", "neutral prompts (pp)"),
}
_RED: dict[str, Any] = {"color": "#B00020", "linewidth": 1, "linestyle": "--"}
_METRICS = {"refusal_logodds": "log-odds of refusing", "logprob_correct": "log P(correct)"}


def handle_site(results: Results) -> str | None:
    """Return the site at which handles were tested: that of the chosen ones, or the one with most records."""
    found = [r.site for r in results.select(quantity="chosen_handle") if r.site]
    found = found or [r.site for r in _tested(results, "interchange_recovery") if r.site]
    return max(dict.fromkeys(found), key=found.count, default=None)


def plot_effect_vs_k(results: Results, out: str | Path | None = None) -> Figure:
    """Draw what handles of each rank do to target prompts, and to neutral ones.

    Above stand recovery and the share of the behavioural gap, over the range from the median to the 95th
    percentile of random subspaces; below the side effects with the limits that chose alpha on dev prompts.

    Args:
        results: Table of a run with `Steering`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no tested handle.
    """
    site = handle_site(results)
    tested = {q: [r for r in _tested(results, q) if r.site == site] for q in _QUANTITIES}
    recoveries = tested["interchange_recovery"]
    if not recoveries:
        raise ConfigError("nothing to draw: no handle was tested; give the results.json of an rq3 run")
    read = [str(r.params.get("metric")) for r in tested["steer_effect"]]
    metric = min((name for name in read if name in _METRICS), default="behaviour")
    tested["steer_effect"] = [r for r in tested["steer_effect"] if str(r.params.get("metric")) == metric]
    ks = sorted({int(r.params["k"]) for r in recoveries})
    random = results.select(quantity="interchange_recovery", control="random", site=site, split="eval")
    random = [r for r in random if r.params.get("edit") == "interchange"]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.2), dpi=DPI, layout="constrained")
        for axes, (quantity, (title, unit)) in zip(
            figure.subplots(2, 2).ravel(), _QUANTITIES.items(), strict=True
        ):
            if quantity == "interchange_recovery":
                _bands(axes, random, ks)
            _points(axes, tested[quantity], ks)
            if quantity.startswith("side_effect"):
                _limit(axes, LIMITS[quantity])
            axes.set_title(title.format(_METRICS.get(metric, metric)))
            axes.set_ylabel(unit)
            axes.set_xticks(range(len(ks)), [str(k) for k in ks])
            axes.set_xlim(-0.5, len(ks) - 0.5)
            axes.set_xlabel("k (directions)")
        used = {str(r.params["edit"]) for r in recoveries}
        handles: list[Any] = [_mark(edit) for edit in EDITS if edit in used]
        handles += [
            Patch(color=colour, alpha=0.5, label=f"random, {said}: median to 95th percentile")
            for draw, (colour, said) in DRAWS.items()
            if any(r.params.get("draw") == draw for r in random)
        ]
        handles.append(Line2D([], [], **_RED, label="limit in the choice of α"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=7)
        sizes = f"n = {_sizes(recoveries)} target and {_sizes(tested['side_effect_bpb'])} neutral prompts."
        more = (
            "α chosen on dev prompts, all else on eval. Lines: 95 % intervals over prompts; of side effects"
        )
        caption(figure, results, f"Site {site}. {more}, one-sided bounds. {sizes}")
        return finish(figure, out)


def plot_alpha_curves(results: Results, out: str | Path | None = None) -> Figure:
    """Draw recovery on dev prompts against alpha, a line per rank and a panel per edit.

    Args:
        results: Table of a run with `Steering`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no sweep over alpha.
    """
    site = handle_site(results)
    swept = [r for r in _main(results, "interchange_recovery", "dev") if r.site == site and _alpha(r)]
    edits = [e for e in EDITS if len({_alpha(r) for r in swept if r.params["edit"] == e}) > 1]
    if not edits:
        raise ConfigError("nothing to draw: no sweep over alpha; give the results.json of an rq3 run")
    chosen = {
        (r.params["edit"], r.params["k"]): _alpha(r)
        for r in _tested(results, "interchange_recovery")
        if r.site == site
    }
    ks = sorted({int(r.params["k"]) for r in swept if r.params["edit"] in edits})
    shades = [colormaps["viridis"](0.9 * i / max(len(ks) - 1, 1)) for i in range(len(ks))]
    with rc_context(STYLE):
        columns = min(len(edits), 2)
        rows = -(-len(edits) // columns)
        figure = Figure(figsize=(WIDTH, 1.1 + 2.7 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(edits) :]:
            axes.remove()
        for axes, edit in zip(grid, edits, strict=False):
            here = [r for r in swept if r.params["edit"] == edit]
            for k, colour in zip(ks, shades, strict=True):
                held = sorted(
                    (_alpha(r), r.value) for r in here if r.params["k"] == k and r.value is not None
                )
                if not held:
                    continue
                x, y = zip(*held, strict=True)
                axes.plot(x, y, color=colour, marker="o", markersize=2.5, linewidth=1.2)
                ring = [point for point in held if point[0] == chosen.get((edit, k))]
                for point in ring:
                    axes.plot(*point, marker="o", markersize=8, mfc="none", mec=colour, mew=1.4)
            _alpha_axis(
                axes, sorted({_alpha(r) for r in here}), [r.value for r in here if r.value is not None]
            )
            axes.set_title(EDITS[edit][2])
            axes.set_ylabel("recovery on dev (fraction)")
        lines = [Line2D([], [], color=c, label=f"k = {k}") for k, c in zip(ks, shades, strict=True)]
        ringed = Line2D([], [], marker="o", markersize=8, mfc="none", mec=GREY, linestyle="none")
        ringed.set_label("chosen: the most effect within the limits")
        figure.legend(handles=[*lines, ringed], loc="outside upper left", ncols=4, fontsize=7)
        more = "α = 1 is the whole natural edit. Values far below 0 are cut off."
        caption(figure, results, f"Site {site}. n = {_sizes(swept)} dev target prompts. {more}")
        return finish(figure, out)


def _main(results: Results, quantity: str, split: str) -> list[Record]:
    """Return the records of the module's own solver: the one with most records."""
    found = [
        r
        for r in results.select(question="rq3", quantity=quantity, control="none", split=split)
        if r.params.get("edit") in EDITS and r.params.get("k") is not None and is_own(r)
    ]
    solvers = [r.params.get("solver") for r in found if r.params["edit"] == "interchange"]
    own = max(dict.fromkeys(solvers), key=solvers.count, default=None)
    return [r for r in found if r.params.get("solver") == own or r.params["edit"] == "add"]


def _tested(results: Results, quantity: str) -> list[Record]:
    return _main(results, quantity, "eval")


def _alpha(record: Record) -> float:
    return float(record.params.get("alpha") or 0)


def _percent(record: Record, number: float) -> float:
    """Turn a share into percent; a side effect in pp is one already."""
    return 100 * number if record.quantity.startswith("side_effect") and record.unit == "fraction" else number


def _points(axes: Axes, records: Sequence[Record], ks: Sequence[int]) -> None:
    """Draw a mark per edit and rank, beside each other, with its interval; a missing value is named."""
    used = [edit for edit in EDITS if any(r.params["edit"] == edit for r in records)]
    for number, edit in enumerate(used):
        colour, shape, _ = EDITS[edit]
        place = (number - (len(used) - 1) / 2) * 0.16
        at = {int(r.params["k"]): r for r in records if r.params["edit"] == edit}
        held = [(ks.index(k) + place, r) for k, r in sorted(at.items()) if r.value is not None]
        y = [_percent(r, float(r.value or 0)) for _, r in held]
        axes.plot([x for x, _ in held], y, color=colour, marker=shape, markersize=4, linewidth=0.9, zorder=3)
        for (x, r), middle in zip(held, y, strict=True):
            low, high = (middle if end is None else _percent(r, end) for end in (r.low, r.high))
            axes.vlines(x, low, high, color=colour, linewidth=1.1, zorder=3)
        for k, r in at.items():
            if r.value is None:
                said = str(r.reason).replace("_", " ")
                style: dict[str, Any] = {"rotation": 90, "fontsize": 6.5, "color": colour, "ha": "center"}
                axes.text(ks.index(k) + place, 0, said, va="bottom", **style)
    axes.axhline(0, color="black", linewidth=0.9)
    if not records:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)


def _bands(axes: Axes, random: Sequence[Record], ks: Sequence[int]) -> None:
    """Draw the range from the median of random subspaces to their 95th percentile behind each rank."""
    for number, (draw, (colour, _)) in enumerate(DRAWS.items()):
        for r in random:
            if r.params.get("draw") == draw and r.params.get("k") in ks and r.value is not None:
                x, top = ks.index(r.params["k"]) + (number - 0.5) * 0.4, r.value if r.high is None else r.high
                axes.bar(x, max(top - r.value, 0), 0.4, bottom=r.value, color=colour, alpha=0.5, linewidth=0)
                axes.hlines(top, x - 0.2, x + 0.2, color=colour, linewidth=1.2)


def _limit(axes: Axes, limit: float) -> None:
    bottom, top = axes.get_ylim()
    top = max(top, 1.4 * limit)
    axes.set_ylim(bottom, top)
    axes.axhline(limit, **_RED)
    axes.axhspan(limit, top, color="#B00020", alpha=0.05, linewidth=0)


def _alpha_axis(axes: Axes, alphas: Sequence[float], values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("α")
    axes.axhline(0, color="black", linewidth=0.9)
    best = max([*values, 0.05])
    axes.set_ylim(max(min([*values, 0.0]), -best) - 0.08 * best, 1.12 * best)


def _mark(edit: str) -> Line2D:
    colour, shape, said = EDITS[edit]
    return Line2D([], [], color=colour, marker=shape, markersize=4, linewidth=0.9, label=said)


def _sizes(records: Sequence[Record]) -> str:
    sizes = sorted({r.n for r in records})
    return " to ".join(str(n) for n in sorted({*sizes[:1], *sizes[-1:]})) or "0"
