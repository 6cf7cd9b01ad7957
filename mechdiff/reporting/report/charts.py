"""Charts as SVG that takes its colours from the page, so that it reads in light, dark and print.

Every mark carries its number, interval and n as a title. No style attribute is used: the page's security
policy would drop it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 34
REACH = 1.5
"""How far a control may lie beyond what is claimed, in spans of that, before it is an arrow at the edge."""
Place = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """One value of a series.

    Attributes:
        x: Place from left to right.
        y: The value.
        low: Lower end of its interval.
        high: Upper end.
        title: What the pointer shows.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: Its name in the legend.
        points: Its points, by x.
        colour: Number of the colour, from 1.
        line: Join the points; else they are open marks, as controls are.
        group: Value of the slider at which it is shown; None is always shown.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    line: bool = True
    group: float | None = None


def tag(name: str, *inner: str, **attributes: object) -> str:
    """Write an element; attribute names take ``_`` for ``-`` and lose a trailing one."""
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    opened = "".join(f' {k}="{escape(str(v))}"' for k, v in given.items())
    return f"<{name}{opened}>{''.join(inner)}</{name}>"


def text(x: float, y: float, said: str, **attributes: object) -> str:
    """Write a piece of text."""
    return tag("text", escape(said), x=_px(x), y=_px(y), **attributes)


def line_chart(
    label: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    ticks: Sequence[float] = (),
    marks: Sequence[tuple[float, str]] = (),
    even: bool = False,
    start: float | None = None,
) -> str:
    """Draw series over a common axis, on a linear scale that holds 0.

    Args:
        label: What the chart shows, for those who cannot see it.
        series: What is drawn.
        x_label: Name of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        ticks: Places with a label on the horizontal axis.
        marks: Vertical lines and their names.
        even: Put the ticks at even distances, as for ranks 1, 2, 4, 8.
        start: Group that is shown first.
    """
    at = _horizontal(series, ticks, even)
    fixed = [s for s in series if s.group is None]
    fixed = fixed if any(s.line for s in fixed) else list(series)
    low, high = _range([p for s in fixed for p in s.points], [s.line for s in fixed for _ in s.points])
    scale = _Scale(low, high)
    parts = [_grid(scale), text(LEFT, TOP - 1, y_label, class_="axis")]
    parts += [text(at(x), HEIGHT - BOTTOM + 14, f"{x:g}", class_="tick", text_anchor="middle") for x in ticks]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, class_="axis", text_anchor="middle"))
    for x, said in marks:
        line = {"x1": _px(at(x)), "x2": _px(at(x)), "y1": TOP + 6, "y2": HEIGHT - BOTTOM}
        parts.append(tag("line", tag("title", escape(said)), class_="mark", **line))
    edges: Counter[float] = Counter()
    for one in series:
        drawn = _line(one, at, scale, edges) if one.line else _marks(one, at, scale, edges, "open")
        hidden = one.group is not None and one.group != start
        group = None if one.group is None else f"{one.group:g}"
        parts.append(tag("g", drawn, class_=f"c{one.colour}" + (" off" if hidden else ""), data_group=group))
    return _svg(label, parts, WIDTH, HEIGHT) + _legend(series)


def head_map(label: str, cells: Sequence[tuple[int, int, float | None, str]], unit: str) -> str:
    """Draw a value per layer and head; it can be read by pointer and by arrow keys.

    Args:
        label: What the map shows.
        cells: Layer, head, value (None where there is none) and what is said of it.
        unit: Unit of the values.
    """
    layers = sorted({layer for layer, *_ in cells})
    heads = sorted({head for _, head, *_ in cells})
    most = max((abs(v) for *_, v, _ in cells if v is not None), default=0.0) or 1.0
    wide, tall = (WIDTH - LEFT - RIGHT) / len(layers), min(16.0, 220 / len(heads))
    height = TOP + tall * len(heads) + BOTTOM + 8
    parts = []
    for layer, head, value, said in cells:
        share = 0.0 if value is None else abs(value) / most
        place = {
            "x": _px(LEFT + wide * layers.index(layer)),
            "y": _px(TOP + tall * heads.index(head)),
            "width": _px(wide - 0.7),
            "height": _px(tall - 0.7),
        }
        sort = "none" if value is None else "pos" if value >= 0 else "neg"
        about = {"class_": f"cell {sort}", "fill_opacity": f"{0.06 + 0.94 * share:.3f}", "data_say": said}
        parts.append(tag("rect", tag("title", escape(said)), **place, **about))
    every = max(1, round(len(layers) / 10))
    for i, layer in enumerate(layers):
        if i % every == 0:
            where = (LEFT + wide * (i + 0.5), height - BOTTOM + 4)
            parts.append(text(*where, str(layer), class_="tick", text_anchor="middle"))
    for i, head in enumerate(heads):
        if tall >= 9 or i % 2 == 0:
            where = (LEFT - 5, TOP + tall * (i + 0.5) + 3.5)
            parts.append(text(*where, str(head), class_="tick", text_anchor="end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height - 8, "layer", class_="axis", text_anchor="middle"))
    parts.append(text(LEFT - 5, TOP - 2, "head", class_="axis", text_anchor="end"))
    drawn = _svg(label, parts, WIDTH, height)
    said = (
        f"largest absolute value {most:.2g} {unit}; point at a cell, or focus the map and use the arrow keys"
    )
    attributes = {"class_": "headmap", "tabindex": "0", "role": "group", "data_columns": str(len(layers))}
    return tag("div", drawn, tag("output", escape(said), aria_live="polite"), aria_label=label, **attributes)


def slider(name: str, values: Sequence[float], start: float) -> str:
    """Write the control that chooses among the groups of the chart above it."""
    at = min(range(len(values)), key=lambda i: abs(values[i] - start))
    stops = " ".join(f"{v:g}" for v in values)
    knob = tag("input", type="range", min=0, max=len(values) - 1, value=at, step=1, data_stops=stops)
    return tag(
        "label",
        escape(name),
        " ",
        knob.removesuffix("</input>"),
        " ",
        tag("output", f"{start:g}"),
        class_="slider",
    )


class _Scale:
    """A linear axis with round ticks."""

    def __init__(self, low: float, high: float) -> None:
        span = (high - low) or 1.0
        rough = 10 ** math.floor(math.log10(span / 4))
        self.step = min((m * rough for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - 4))
        self.low, self.high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        share = (inside - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP - 6)

    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]


def _range(points: Sequence[Point], main: Sequence[bool]) -> tuple[float, float]:
    """Return the ends of an axis: all of what is claimed, and controls unless they would squash it."""
    ends = [v for p, m in zip(points, main, strict=True) if m for v in (p.y, p.low, p.high) if v is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = (high - low) or 1.0
    beside = [p.y for p, m in zip(points, main, strict=True) if not m]
    near = [v for v in beside if low - REACH * room <= v <= high + REACH * room]
    return min([low, *near]), max([high, *near])


def _horizontal(series: Sequence[Series], ticks: Sequence[float], even: bool) -> Place:
    """Return the map from a value to its place from left to right."""
    places = sorted({p.x for s in series for p in s.points} | set(ticks))
    inner = WIDTH - LEFT - RIGHT - 20
    if even:
        return lambda x: LEFT + 10 + inner * places.index(x) / max(len(places) - 1, 1)
    first, last = (places[0], places[-1]) if places else (0.0, 1.0)
    return lambda x: LEFT + 10 + inner * (x - first) / ((last - first) or 1.0)


def _grid(scale: _Scale) -> str:
    parts = []
    for value in scale.ticks():
        y = _px(scale(value))
        kind = "zero" if abs(value) < scale.step / 2 else "grid"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_=kind))
        said = f"{0 if kind == 'zero' else value:.4g}".replace("-", "−")
        parts.append(text(LEFT - 6, scale(value) + 3.5, said, class_="tick", text_anchor="end"))
    return "".join(parts)


def _line(one: Series, at: Place, scale: _Scale, edges: Counter[float]) -> str:
    band = [(p.x, p.low, p.high) for p in one.points if p.low is not None and p.high is not None]
    parts = []
    if len(band) > 1:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        corners = " ".join(f"{_px(at(x))},{_px(scale(y))}" for x, y in edge)
        parts.append(tag("polygon", points=corners, class_="band"))
    elif band:
        ((x, low, high),) = band
        ends = {"x1": _px(at(x)), "x2": _px(at(x)), "y1": _px(scale(low)), "y2": _px(scale(high))}
        parts.append(tag("line", **ends, class_="line"))
    path = " ".join(f"{_px(at(p.x))},{_px(scale(p.y))}" for p in one.points)
    parts.append(tag("polyline", points=path, class_="line"))
    return "".join(parts) + _marks(one, at, scale, edges, "dot")


def _marks(one: Series, at: Place, scale: _Scale, edges: Counter[float], kind: str) -> str:
    """Draw values; one beyond the axis is an arrow with its number at the edge, clear of others there."""
    parts = []
    for p in one.points:
        said, x = tag("title", escape(p.title)), at(p.x)
        if scale.low <= p.y <= scale.high:
            parts.append(tag("circle", said, class_=kind, cx=_px(x), cy=_px(scale(p.y)), r="3"))
            continue
        below = p.y < scale.low
        number = f"{'↓' if below else '↑'}{p.y:.2g}".replace("-", "−")
        clear = (-9 if below else 9) * edges[x]
        edges[x] += one.group is None
        y = _px(scale(p.y) + clear + (-3 if below else 9))
        parts.append(tag("text", said, number, class_="edge", x=_px(x), y=y, text_anchor="middle"))
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    names = {s.name: s for s in series if s.name}
    items = [
        tag("li", tag("i", class_=f"c{s.colour} {'key' if s.line else 'key ring'}"), escape(name))
        for name, s in names.items()
    ]
    return tag("ul", *items, class_="legend") if len(items) > 1 else ""


def _svg(label: str, parts: Sequence[str], width: float, height: float) -> str:
    box = f"0 0 {width} {_px(height)}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=label, xmlns="http://www.w3.org/2000/svg")


def _px(value: float) -> str:
    return f"{value:.1f}"
