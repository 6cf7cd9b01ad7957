"""How much of a number belongs to the seed of the training: siblings of one recipe, measured in the same way.

1. Each replica is a pair of the same base and a sibling trained with another seed; each was run as a study.
2. Of the numbers that a report speaks of, the spread between seeds (standard deviation) stands beside that
   within a run, which is due to its prompts (from the half width of the interval). Where there are intervals,
   what is left of the spread between seeds is the seed's own: variance between − mean variance within.
3. Few seeds say little: the spread of three is known to a factor of about two. Every value is kept.

Source: the estimate by moments of DerSimonian and Laird, Controlled Clinical Trials 7 (1986) 177, with equal
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from mechdiff.config import LEVEL
from mechdiff.errors import ConfigError
from mechdiff.reporting.report import handle, heads, where
from mechdiff.reporting.report.content import Citations
from mechdiff.reporting.report.runs import read_study
from mechdiff.reporting.report.view import View
from mechdiff.results import Record, Results

FILE = "replication.json"
FLAG = "spread_of_seeds"
FEWEST = 2
"""Replicas without which there is no spread."""


def replicate(folders: Sequence[str | Path]) -> Results:
    """Compare studies of siblings that one recipe made with different seeds.

    Args:
        folders: A study, or the runs, of each sibling; named after the folders.

    Returns:
        A record for each number: the mean over seeds, from the least to the greatest; the spread stands in
        ``params``.

    Raises:
        ConfigError: If there are fewer than two, or they are not replicas of one pair.
    """
    if len(folders) < FEWEST:
        raise ConfigError(f"{len(folders)} study is given; a spread needs at least {FEWEST} seeds")
    views = {Path(folder).resolve().name: _view(folder) for folder in folders}
    if len(views) < len(folders):
        raise ConfigError("two studies have the same name; name the folders after their seeds")
    _check(views)
    found = [_spread(quantity, pick, views) for quantity, pick in SPOKEN_OF.items()]
    origin = {name: view.pair.provenance.get("models", {}) for name, view in views.items()}
    pair = next(iter(views.values())).name
    return Results([r for r in found if r is not None], {"pair": pair, "replicas": origin})


def _view(folder: str | Path) -> View:
    pairs = read_study([folder]).pairs
    if len(pairs) != 1:
        names = ", ".join(pair.name for pair in pairs)
        raise ConfigError(f"{folder} holds runs of {names}; give a study of one pair for each seed")
    return View(pairs[0], Citations())


def _check(views: Mapping[str, View]) -> None:
    """Refuse what is not one pair trained several times.

    Raises:
        ConfigError: If names or bases differ, or two siblings are the same.
    """
    if len(names := {view.name for view in views.values()}) > 1:
        raise ConfigError(f"the studies are of {' and '.join(sorted(names))}; replicas are of one pair")
    models = {name: view.pair.provenance.get("models", {}) for name, view in views.items()}
    weights = {
        role: {name: own.get(role, {}).get("weights", name) for name, own in models.items()}
        for role in ("base", "tuned")
    }
    if len(set(weights["base"].values())) > 1:
        raise ConfigError(f"the bases of {', '.join(views)} differ; replicas have the same base")
    seen: dict[str, str] = {}
    for name, fingerprint in weights["tuned"].items():
        if fingerprint in seen:
            raise ConfigError(f"{seen[fingerprint]} and {name} hold the same tuned model; give one per seed")
        seen[fingerprint] = name


def _spread(quantity: str, pick: Callable[[View], Record | None], views: Mapping[str, View]) -> Record | None:
    """Return the record of one number over seeds, None if no run has measured it."""
    found = {name: r for name, view in views.items() if (r := pick(view)) is not None}
    if not found:
        return None
    first, held = next(iter(found.values())), [r for r in found.values() if r.value is not None]
    values = [float(r.value) for r in held if r.value is not None]
    params: dict[str, Any] = {k: first.params[k] for k in KEPT if k in first.params}
    params |= {"over": "seeds", "seeds": {name: _said(r) for name, r in found.items()}}
    about: dict[str, Any] = {"question": first.question, "unit": first.unit, "positions": first.positions}
    about |= {"split": first.split, "flags": (FLAG,), "n": min(r.n for r in found.values())}
    if len(values) < FEWEST:
        return Record(quantity=quantity, value=None, reason="too_few_seeds", params=params, **about)
    params |= dict(_variances(held, values))
    return Record(
        quantity=quantity, value=fmean(values), low=min(values), high=max(values), params=params, **about
    )


def _variances(held: Sequence[Record], values: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield standard deviations: between seeds, within runs, and of the seed alone."""
    between = stdev(values)
    yield "sd_between", between
    halves = [(r.high - r.low) / 2 for r in held if r.low is not None and r.high is not None]
    if len(halves) == len(held):
        z = NormalDist().inv_cdf((1 + LEVEL) / 2)
        within = fmean((half / z) ** 2 for half in halves)
        yield "sd_within", math.sqrt(within)
        yield "sd_seed", math.sqrt(max(between**2 - within, 0.0))


def _said(r: Record) -> dict[str, Any]:
    """Return what a run says, with its own interval and site."""
    found: dict[str, Any] = {"value": r.value, "low": r.low, "high": r.high, "n": r.n}
    return found | {k: v for k, v in (("site", r.site), ("reason", r.reason)) if v is not None}


def _onset(view: View) -> Record | None:
    about = {"direction": "into_tuned", "positions": "last", "model": "pair"}
    return view.pair.one("rq1", quantity="patch_onset", **about)


def _recovery(view: View) -> Record | None:
    site = next((r.site for r in where.proposed(view) if r.params.get("rank") == 1), None)
    return None if site is None else where.recovery(view, site)


SPOKEN_OF: dict[str, Callable[[View], Record | None]] = {
    "patch_onset": _onset,
    "patch_recovery": lambda view: _recovery(view) if view.has("rq1") else None,
    **{
        quantity: (lambda view, quantity=quantity: handle.minimal(view, quantity, "interchange"))  # type: ignore[misc]
        for quantity in handle.MINIMAL
    },
    "churn": lambda view: heads.churn(view)[0] if view.has("rq4") else None,
}
"""What is compared, and how a run's number is found: the one that its report speaks of."""

KEPT = ("direction", "rule", "floor_from", "edit", "metric", "baseline", "method")
"""What of a number's cell is the same in all runs."""
