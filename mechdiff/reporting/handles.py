"""Draw what is asked of a handle beside its size: other languages, where to monitor, and which heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechdiff.errors import ConfigError
from mechdiff.reporting.cells import layer
from mechdiff.reporting.divergence import DPI, MODELS, WIDTH, caption, finish
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.reporting.steering import EDITS, handle_site
from mechdiff.results import Record, Results

LANGS = ("kk", "ru", "en")
"""Languages in the order in which they are shown; others follow."""
GROUPS = {"attribution": ("#0072B2", "highest attribution"), "random": ("#E69F00", "drawn at random")}
TOP_HEADS = 12
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def plot_transfer_matrix(results: Results, out: str | Path | None = None) -> Figure:
    """Draw how well handles fitted on one language work on another, and under other wrappings of prompts.

    Args:
        results: Table of a run with `Transfer`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no transfer.
    """
    found = results.select(question="rq3", quantity="transfer_effect", control="none")
    sites = sorted({r.site for r in found if r.site}, key=layer)
    if not sites:
        raise ConfigError(
            "nothing to draw: no record of transfer_effect; give the results.json of an rq3 run"
        )
    site = handle_site(results) if handle_site(results) in sites else sites[-1]
    found = [r for r in found if r.site == site and r.params["metric"] == "recovery"]
    plain = [r for r in found if r.params["template"] == "{text}"]
    edits = [e for e in EDITS if any(r.params["edit"] == e for r in plain)]
    wrapped = [r for r in found if r.params["fitted_on"] == "all"]
    with rc_context(STYLE):
        rows = 1 + (len({r.params["template"] for r in wrapped}) > 1)
        figure = Figure(figsize=(WIDTH, 0.8 + 2.7 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, len(edits), squeeze=False)
        for column, edit in enumerate(edits):
            own = [r for r in plain if r.params["edit"] == edit]
            _matrix(grid[0, column], own)
            strength = f"k = {own[0].params['k']}, α = {own[0].params['alpha']:g}"
            grid[0, column].set_title(f"Recovery, {edit} ({strength})")
            if rows > 1:
                _wrappings(grid[1, column], [r for r in wrapped if r.params["edit"] == edit])
                grid[1, column].set_title(f"Other wrappings of a prompt, {edit}")
        tested = _ordered({r.params["lang"] for r in wrapped})
        dot: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "none"}
        if rows > 1:
            pairs = zip(tested, _COLOURS, strict=False)
            handles = [
                Line2D([], [], color=colour, label=f"tested on {lang}", **dot) for lang, colour in pairs
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=7)
        more = f"Site {site}, over shared tokens."
        sizes = ", ".join(f"{lang}: {n}" for lang, n in sorted({(r.params["lang"], r.n) for r in plain}))
        caption(figure, results, f"{more} Eval target prompts ({sizes}). [ ]: 95 % intervals over prompts.")
        return finish(figure, out)


def plot_monitor(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the held-out AUROC of a linear probe by layer, for both models.

    Args:
        results: Table of a run with `Monitor`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no probe.
    """
    found = results.select(question="rq3", quantity="probe_auroc")
    if not found:
        raise ConfigError("nothing to draw: no record of probe_auroc; give the results.json of an rq3 run")
    langs = _ordered({r.params["lang"] for r in found if r.value is not None and r.control == "none"})
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.5), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, max(len(langs), 1), squeeze=False, sharey=True).ravel()
        for axes, lang in zip(panels, langs, strict=False):
            here = [r for r in found if r.params["lang"] == lang and r.value is not None]
            for model in ("base", "tuned"):
                own = [r for r in here if r.model == model and r.control == "none"]
                _line(axes, own, MODELS[model], 0.15)
            _line(axes, [r for r in here if r.model == "tuned" and r.control == "shuffled"], GREY, 0.12)
            axes.axhline(0.5, color="black", linewidth=0.9, linestyle=":")
            n = max((r.n for r in here), default=0)
            axes.set_title(f"{'all languages' if lang == 'all' else lang} (n = {n})")
            axes.set_xlabel("layer (resid_post)")
        panels[0].set_ylabel("AUROC on eval, target against neutral")
        handles = [Line2D([], [], color=MODELS[m], label=m) for m in ("base", "tuned")]
        handles.append(Line2D([], [], color=GREY, label="shuffled labels (tuned): median, 90 % of draws"))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        caption(figure, results, "Probe of dev prompts, last position. Bands: 95 % intervals over prompts.")
        return finish(figure, out)


def plot_head_paths(results: Results, out: str | Path | None = None) -> Figure:
    """Draw what single heads carry to the handle: the largest ones, and how all of them are spread.

    Args:
        results: Table of a run with `HandleHeads`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no head.
    """
    found = results.select(question="rq3", quantity="head_path_effect", metric="projection", mode="swap")
    total = {r.params["head"]: r for r in found if r.params["path"] == "total" and r.value is not None}
    if not total:
        raise ConfigError(
            "nothing to draw: no record of head_path_effect; give the results.json of an rq3 run"
        )
    direct = {r.params["head"]: r for r in found if r.params["path"] == "direct" and r.value is not None}
    top = sorted(total.values(), key=lambda r: -abs(float(r.value or 0)))[:TOP_HEADS]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.7), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for i, r in enumerate(top):
            value = float(r.value or 0)
            left.bar(i, value, 0.7, color=GROUPS[r.params["group"]][0], alpha=0.85)
            if r.low is not None and r.high is not None:
                left.vlines(i, r.low, r.high, color="black", linewidth=1.1)
            if beside := direct.get(r.params["head"]):
                left.plot(i, beside.value, marker="D", mfc="white", mec="black", markersize=4)
        left.axhline(0, color="black", linewidth=0.9)
        left.set_xticks(range(len(top)), [str(r.params["head"]) for r in top], rotation=45, fontsize=7)
        left.set_xlabel("head (layer.head)")
        left.set_ylabel("share of tuned − base on the handle")
        left.set_title("Base's head put into tuned: the largest")
        values = {
            g: [100 * float(r.value or 0) for r in total.values() if r.params["group"] == g] for g in GROUPS
        }
        values = {g: column for g, column in values.items() if column}
        colours = [GROUPS[g][0] for g in values]
        right.hist(list(values.values()), bins=12, color=colours, alpha=0.85, rwidth=0.9)
        right.set_title("All heads tried")
        right.set_xlabel("share of tuned − base on the handle (%)")
        right.set_ylabel("heads")
        handles: list[Any] = [Patch(color=GROUPS[g][0], label=GROUPS[g][1]) for g in values]
        style: dict[str, Any] = {"linestyle": "none", "mfc": "white", "mec": "black", "markersize": 4}
        handles.append(Line2D([], [], marker="D", label="direct path alone", **style))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        more = (
            f"Site {top[0].site}, k = {top[0].params['k']}, last position, n = {top[0].n} dev target prompts."
        )
        caption(figure, results, f"{more} 1 would be base's state on the handle. Lines: 95 % intervals.")
        return finish(figure, out)


def _ordered(names: set[str]) -> list[str]:
    known = [name for name in ("all", *LANGS) if name in names]
    return known + sorted(names - set(known))


def _matrix(axes: Axes, records: Sequence[Record]) -> None:
    """Draw a cell per language of the fit and of the test with its interval; a missing value is named."""
    fits = _ordered({r.params["fitted_on"] for r in records})
    langs = _ordered({r.params["lang"] for r in records})
    cells = {(r.params["fitted_on"], r.params["lang"]): r for r in records}
    held = [[cells.get((f, lang)) for lang in langs] for f in fits]
    shown = [[float("nan") if r is None or r.value is None else r.value for r in row] for row in held]
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    axes.vlines([j + 0.5 for j in range(len(langs) - 1)], -0.5, len(fits) - 0.5, color="white", linewidth=2)
    axes.hlines([i + 0.5 for i in range(len(fits) - 1)], -0.5, len(langs) - 0.5, color="white", linewidth=2)
    for i, row in enumerate(held):
        for j, r in enumerate(row):
            if r is None:
                continue
            dark = r.value is not None and r.value > 0.6
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            if r.value is None:
                axes.text(j, i, str(r.reason).replace("_", " "), **{**style, "color": GREY}, fontsize=7)
                continue
            axes.text(j, i - 0.1, f"{r.value:.2f}".replace("-", "−"), **style, fontsize=9)
            if r.low is not None and r.high is not None:
                ends = f"[{r.low:.2f}, {r.high:.2f}]".replace("-", "−")
                axes.text(j, i + 0.22, ends, **style, fontsize=6.5)
    axes.set_xticks(range(len(langs)), langs)
    axes.set_yticks(range(len(fits)), fits)
    axes.set_xlabel("tested on")
    axes.set_ylabel("fitted on")


def _wrappings(axes: Axes, records: Sequence[Record]) -> None:
    templates = list(dict.fromkeys(str(r.params["template"]) for r in records))
    langs = _ordered({r.params["lang"] for r in records})
    for number, (lang, colour) in enumerate(zip(langs, _COLOURS, strict=False)):
        place = (number - (len(langs) - 1) / 2) * 0.18
        for r in records:
            if r.params["lang"] == lang and r.value is not None:
                x = templates.index(str(r.params["template"])) + place
                axes.plot(x, r.value, marker="o", markersize=4, color=colour)
                if r.low is not None and r.high is not None:
                    axes.vlines(x, r.low, r.high, color=colour, linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set_xlim(-0.5, len(templates) - 0.5)
    names = [" ".join(t.replace("{text}", "…").split()) for t in templates]
    axes.set_xticks(range(len(names)), ["as it is" if name == "…" else name for name in names])
    axes.set_ylabel("recovery (handle fitted on all)")


def _line(axes: Axes, records: Sequence[Record], colour: str, alpha: float) -> None:
    held = sorted((layer(str(r.site)), r.value, r.low, r.high) for r in records)
    if not held:
        return
    x, y, low, high = zip(*held, strict=True)
    axes.plot(x, y, color=colour, marker="o", markersize=2.5, linewidth=1.2)
    axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)
