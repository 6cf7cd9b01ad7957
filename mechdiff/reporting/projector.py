"""Show states of both models in TensorBoard's projector, by the class of their prompt.

1. One table per site that the run speaks of, of the last position before the answer: a row per prompt and
   model.
2. At most `ROWS` rows; of more prompts, evenly spaced ones, the same of both models.
3. The first `WIDTH` principal components stand for the states. The projector itself would take as many random
   directions of wider states before it finds components of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechdiff.data.store import POSITIONS, ActivationStore
from mechdiff.reporting.cells import sites_of
from mechdiff.reporting.steering import handle_site
from mechdiff.results import Results, handed_on

ROWS = 5000
"""Rows of a table; more are slow to show."""
WIDTH = 200
"""Components of a row."""
ROLES = {"source": "base", "target": "tuned"}
HEADER = ["label", "class", "model", "lang", "topic", "template", "prompt"]


def log_states(writer: Any, results: Results, stores: Mapping[str, ActivationStore]) -> None:
    """Write a table of states for each site that a run speaks of.

    Args:
        writer: A TensorBoard writer.
        results: Table of the run.
        stores: States of ``source`` and ``target``.
    """
    for site in spoken_of(results):
        held = {r: s for r, s in stores.items() if site in map(str, s.sites)}
        parts = [_rows(store, site, ROLES[role], ROWS // len(held)) for role, store in held.items()]
        widths = {states.shape[1] for states, _ in parts}
        groups = [[part for part in parts if part[0].shape[1] == width] for width in sorted(widths)]
        for group in groups:
            states = torch.cat([states for states, _ in group])
            labels = [label for _, labels in group for label in labels]
            tag = site if len(groups) == 1 else f"{site}.{labels[0][2]}"
            writer.add_embedding(components(states).numpy(), labels, tag=tag, metadata_header=HEADER)


def spoken_of(results: Results) -> list[str]:
    """Return the sites that a run proposes, maps, or has handles at.

    Args:
        results: Table of a run.
    """
    sites = [str(r.site) for r in handed_on(results)] + sites_of(results, ["r2"])
    return list(dict.fromkeys([*sites, *([site] if (site := handle_site(results)) else [])]))


def components(states: Tensor, width: int = WIDTH) -> Tensor:
    """Return the first principal components of states, to four digits.

    Args:
        states: ``(rows, d)``.
        width: How many, at most.

    Returns:
        ``(rows, min(width, rows, d))``, float64.
    """
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    found = u[:, :width] * s[:width]
    largest = float(found.abs().max()) or 1.0
    places = 3 - int(torch.tensor(largest).log10().floor())
    return found.round(decimals=places)


def _rows(store: ActivationStore, site: str, model: str, most: int) -> tuple[Tensor, list[list[str]]]:
    """Read the last position of the prompts, and what is known of each."""
    rows = (store.groups == POSITIONS.index("last")).nonzero().flatten()
    rows = rows[store.rows.example[rows].argsort(stable=True)]
    if len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most).round().long()]
    labels = []
    for index in store.rows.example[rows].tolist():
        e = store.examples[index]
        labels.append([f"{e.label}, {model}", e.label, model, e.lang, e.topic, e.template, e.id])
    return store.read(site, rows), labels
