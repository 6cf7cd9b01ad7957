"""Draw where two models differ: divergence by layer, and the effect of layer patches."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechdiff.errors import ConfigError
from mechdiff.files import whole
from mechdiff.reporting.cells import component, layer, pair_name
from mechdiff.reporting.panels import COLOURS, GREY, MARKERS, STYLE, Cell, bars, label_sites, marker
from mechdiff.results import Record, Results

WIDTH, DPI = 8.0, 150
DIRECTIONS = {"into_tuned": "Base's state put into tuned", "into_base": "Tuned's state put into base"}
CONTROLS = ("other_prompt", "random", "wrong_layer")
MODELS = {"base": "#0072B2", "tuned": "#D55E00", "reference": "#009E73"}
_LINES: dict[str, Any] = {
    "debiased": {"color": "#0072B2", "linestyle": "-"},
    "debiased, within class and language": {"color": "#D55E00", "linestyle": "-"},
    "biased": {"color": GREY, "linestyle": ":"},
}


def curve(
    results: Results, quantity: str, centred: bool = False, contrast: str | None = None
) -> list[Record]:
    """Return the CKA of each site with itself, in order of the layers.

    Args:
        results: Table of a run.
        quantity: ``cka`` or ``cka_debiased``.
        centred: Within class and language.
        contrast: Two models, where one is the reference; by default the pair's own.
    """
    model = "pair" if contrast is None else "reference"
    found = [
        r
        for r in results.select(question="rq1", quantity=quantity, model=model)
        if ("centred" in r.params) == centred
        and "matrix" not in r.params
        and r.params.get("contrast") == contrast
        and r.site
    ]
    first = found[0].positions if found else None
    return sorted((r for r in found if r.positions == first), key=lambda r: layer(str(r.site)))


def plot_divergence_curve(results: Results, out: str | Path | None = None) -> Figure:
    """Draw 1 − CKA by layer with 95 % bands, and the layers proposed.

    Args:
        results: Table of a run of `Divergence`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no CKA of the pair.
    """
    own = {
        "debiased": curve(results, "cka_debiased"),
        "debiased, within class and language": curve(results, "cka_debiased", centred=True),
        "biased": curve(results, "cka"),
    }
    if not own["debiased"]:
        raise ConfigError("nothing to draw: no record of cka_debiased; give the results.json of an rq1 run")
    contrasts = sorted(
        {
            r.params["contrast"]
            for r in results.select(model="reference", quantity="cka_debiased")
            if " minus " not in r.params["contrast"]
        }
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 2 if contrasts else 1, squeeze=False, sharey=True).ravel()
        for name, records in own.items():
            _line(panels[0], records, name, **_LINES[name], band=name != "biased")
        chosen = results.select(quantity="chosen_layer", by="cka_debiased")
        for number, r in enumerate(chosen):
            label = "proposed" if not number else None
            panels[0].axvline(float(r.value or 0), color="black", linewidth=0.8, linestyle="--", label=label)
        panels[0].set_title("How much tuned differs from base")
        for contrast, colour in zip(contrasts, ("#009E73", "#0072B2", "#CC79A7"), strict=False):
            records = curve(results, "cka_debiased", contrast=contrast)
            _line(panels[1], records, contrast.replace("-", " and "), color=colour, band=True)
            panels[1].set_title("Three models, on the curve's prompts (debiased)")
        for axes in panels:
            axes.axhline(0, color="black", linewidth=0.9)
            axes.set_xlabel(f"layer ({component(str(own['debiased'][0].site))})")
            axes.set_ylabel("divergence, 1 − CKA")
            axes.legend(fontsize=7)
        first = own["debiased"][0]
        more = f"n = {first.n} prompts, {first.positions} position, split {first.split}."
        caption(figure, results, f"Bands: 95 % jackknife intervals over prompts. {more}")
        return finish(figure, out)


def plot_divergence_matrix(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the debiased CKA of every layer of base with every layer of tuned.

    Args:
        results: Table of a run of `Divergence` with ``matrix``.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no matrix.
    """
    records = results.select(question="rq1", quantity="cka_debiased", matrix=True)
    records = [r for r in records if r.positions == records[0].positions]
    if not records:
        raise ConfigError("nothing to draw: no matrix of CKA; run with --model.matrix=true")
    targets, sources = (
        sorted(set(names), key=layer)
        for names in ((str(r.site) for r in records), (r.params["source_site"] for r in records))
    )
    values = {(r.params["source_site"], str(r.site)): r.value for r in records}
    grid = [[values.get((s, t)) for t in targets] for s in sources]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 6.4), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        shown = [[float("nan") if v is None else v for v in row] for row in grid]
        image = axes.imshow(shown, origin="lower", cmap="viridis", aspect="equal")
        figure.colorbar(image, ax=axes, label="debiased CKA", shrink=0.85)
        axes.set_xticks(range(len(targets)), [str(layer(t)) for t in targets])
        axes.set_yticks(range(len(sources)), [str(layer(s)) for s in sources])
        axes.set_xlabel("layer of tuned")
        axes.set_ylabel("layer of base")
        axes.set_title("Which layers of base resemble which of tuned")
        caption(figure, results, f"n = {records[0].n} prompts, {records[0].positions} position.")
        return finish(figure, out)


def plot_layer_patch(results: Results, out: str | Path | None = None) -> Figure:
    """Draw recovery by patched layer, in both directions, and the effect on refusing.

    Args:
        results: Table of a run with `LayerPatch`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no recovery.
    """
    everything = results.select(quantity="patch_recovery", model="pair")
    records = [r for r in everything if r.params.get("prompts") == "curve"]
    if not any(r.positions for r in records):
        raise ConfigError("nothing to draw: no record of patch_recovery; give the results.json of an rq1 run")
    sites = _sites(records)
    effects = results.select(quantity="patch_effect")
    solved = [r for r in effects if r.params.get("metric") == "logprob_correct"]
    effects = solved or effects  # a problem's answer says more than a refusal
    with rc_context(STYLE):
        rows = 2 if effects else 1
        figure = Figure(figsize=(WIDTH, 0.9 + 2.9 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        groups = [g for g in ("last", "all") if any(r.positions == g for r in records)]
        for column, (direction, title) in enumerate(DIRECTIONS.items()):
            axes = grid[0, column]
            cells = {c: _cell(results, direction, "all", c) for c in CONTROLS}
            bars(axes, sites, groups, _cell(results, direction, "curve"), cells)
            label_sites(axes, sites)
            axes.set_title(title)
            axes.set_ylabel("recovery (fraction; 1 = the donor)")
            onsets = results.select(quantity="patch_onset", direction=direction, model="pair")
            for r in onsets:
                if r.site in sites and r.positions == "last":
                    axes.axvline(sites.index(r.site) - 0.5, color="black", linewidth=0.8, linestyle="--")
            here = [r for r in effects if r.params["direction"] == direction]
            if here:
                _effects(grid[1, column], here, groups)
            elif effects:
                grid[1, column].remove()
        handles: list[Any] = [
            Patch(color=COLOURS[g], label=f"{g} position{'s' * (g == 'all')}") for g in groups
        ]
        used = {r.control for r in everything}
        handles += [marker(c) for c in CONTROLS if c in used]
        handles += [Line2D([], [], color="black", linestyle="--", linewidth=0.8, label="onset (last)")]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        controls = [r for r in everything if r.control in CONTROLS]
        more = f"n = {sizes(records)} {records[0].split} prompts"
        more += f", controls {sizes(controls)} eval prompts" if controls else ""
        more += f", below {sizes(effects)} for each class." if effects else "."
        caption(figure, results, f"Lines: 95 % intervals over prompts. {more}")
        return finish(figure, out)


def _sites(records: Iterable[Record]) -> list[str]:
    return sorted({r.site for r in records if r.site}, key=layer)


def sizes(records: Iterable[Record]) -> str:
    """Say how many prompts are behind some records."""
    found = sorted({r.n for r in records if r.n}) or [0]
    return " to ".join(str(n) for n in sorted({found[0], found[-1]}))


def _cell(results: Results, direction: str, prompts: str, control: str = "none") -> Cell:
    about = {"quantity": "patch_recovery", "model": "pair", "prompts": prompts}
    found = results.select(direction=direction, control=control, **about)
    at = {(r.site, r.positions): r for r in found}
    return lambda site, group: at.get((site, group))


def _line(axes: Axes, records: Sequence[Record], name: str, band: bool, **style: Any) -> None:
    held = [(layer(str(r.site)), 1 - r.value, r) for r in records if r.value is not None]
    if not held:
        return
    axes.plot([x for x, *_ in held], [y for _, y, _ in held], label=name, marker="o", markersize=2.5, **style)
    ends = [(x, 1 - r.high, 1 - r.low) for x, _, r in held if r.low is not None and r.high is not None]
    if band and ends:
        x, low, high = zip(*ends, strict=True)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _effects(axes: Axes, effects: Sequence[Record], groups: Sequence[str]) -> None:
    """Draw changes of graded behaviour, by site, class of prompts and patched positions."""
    cells: dict[str, dict[str, Record]] = {}
    beside: list[tuple[str, str, Record]] = []
    for r in sorted(effects, key=lambda r: layer(str(r.site))):
        name = f"layer {layer(str(r.site))} {r.params['label']}"
        if r.control == "none":
            cells.setdefault(name, {})[str(r.positions)] = r
        elif r.value is not None:
            beside.append((name, str(r.positions), r))
    grouped(axes, cells, groups, COLOURS)
    if len(cells) > 6:  # their n is in the caption
        names = [name.removeprefix("layer ") for name in cells]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 4, "mfc": "white", "mec": "black"}
    for name, group, r in beside:
        place = _place(list(cells).index(name), groups.index(group), groups)
        axes.plot(place, float(r.value or 0), **style, **MARKERS[r.control])
    solved = effects[0].params.get("metric") == "logprob_correct"
    axes.set_ylabel(f"change of {'log P(correct)' if solved else 'log-odds'} (nats)")
    axes.set_title(f"What it does to {'solving' if solved else 'refusing'}")


def _place(i: int, j: int, groups: Sequence[str]) -> float:
    """Return where the bar of a group stands within a cell."""
    return i + (j - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 2)


def grouped(
    axes: Axes,
    cells: dict[str, dict[str, Record]],
    groups: Sequence[str],
    colours: dict[str, str] = MODELS,
) -> None:
    """Draw a bar per cell and group; a missing value is named."""
    width = 0.8 / max(len(groups), 2)
    for i, cell in enumerate(cells.values()):
        for j, group in enumerate(groups):
            r, x = cell.get(group), _place(i, j, groups)
            if r is None:
                continue
            if r.value is None:
                said = str(r.reason).replace("_", " ")
                axes.text(x, 0, said, rotation=90, fontsize=6.5, color=GREY, ha="center", va="bottom")
                continue
            axes.bar(x, r.value, width * 0.9, color=colours[group], alpha=0.85)
            if r.low is not None and r.high is not None:
                axes.vlines(x, r.low, r.high, color="black", linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.9)
    names = [
        "\n".join([*textwrap.wrap(name.replace("_", " "), 9), f"n = {sizes(cell.values())}"])
        for name, cell in cells.items()
    ]
    axes.set_xticks(range(len(names)), names, fontsize=6.5)
    half, middle = max(len(names), 2) / 2 + 0.1, (len(names) - 1) / 2
    axes.set_xlim(middle - half, middle + half)


def caption(figure: Figure, results: Results, more: str) -> None:
    """Write the pair's name and a remark below a figure."""
    name = pair_name(results)
    text = textwrap.fill(f"Pair {name}. {more}" if name else more, 150)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=GREY)


def finish(figure: Figure, out: str | Path | None) -> Figure:
    """Save a figure if there is a file for it."""
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(out)) as part:
            figure.savefig(part, format=Path(out).suffix.removeprefix("."))
    return figure
