"""Find the records that a figure or table shows.

A run may hold several records of one quantity at one site, such as a layer by layer matrix of R². What is
shown is the map from the site's own layer where there is one, on the split that is reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from mechdiff.results import Record, Results

POSITIONS = ("last", "user", "template", "all")
"""Groups of positions, in the order in which they are shown."""

CONTROLS = ("mean_shift", "shuffled", "wrong_layer")
"""Controls drawn beside every number; the identity map and the self-patch have a place of their own."""

REPORTED_SPLITS = ("test", "eval")


def find(
    results: Results, quantity: str, site: str, positions: str | None, control: str = "none"
) -> Record | None:
    """Return the record of one cell of the map question, None if it was not measured."""
    where = {
        "question": "rq2",
        "quantity": quantity,
        "site": site,
        "positions": positions,
        "control": control,
    }
    found = [r for r in results.select(**where) if r.split in REPORTED_SPLITS]
    own_layer = [r for r in found if r.params.get("source_site") in (None, site)]
    return next(iter(own_layer or found), None)


def sites_of(results: Results, quantities: Iterable[str]) -> list[str]:
    """Return the sites at which any of the quantities was measured, by component and layer."""
    wanted = set(quantities)
    found = {r.site for r in results.select(question="rq2") if r.quantity in wanted and r.site}
    return sorted(found, key=lambda site: (component(site), layer(site)))


def positions_of(results: Results, quantities: Iterable[str]) -> list[str]:
    """Return the groups of positions at which any of the quantities was measured."""
    wanted = set(quantities)
    found = {r.positions for r in results.select(question="rq2") if r.quantity in wanted}
    return [group for group in POSITIONS if group in found]


def component(site: str) -> str:
    """Return ``resid_post`` for ``resid_post.12``."""
    return site.rpartition(".")[0]


def layer(site: str) -> int:
    """Return 12 for ``resid_post.12``."""
    return int(site.rpartition(".")[2])


def pair_name(results: Results) -> str:
    """Return the name of the pair, empty if the run does not say."""
    pair = results.provenance.get("pair", "")
    return str(pair.get("name", "")) if isinstance(pair, dict) else str(pair)


def counts(results: Results, quantity: str) -> str:
    """Say what is behind a quantity, such as ``last: 131 prompts; user: 131 prompts, 2,711 rows``."""
    parts = []
    for group in positions_of(results, [quantity]):
        records = [find(results, quantity, site, group) for site in sites_of(results, [quantity])]
        sizes = {(r.n, r.rows) for r in records if r}
        prompts = _span(n for n, _ in sizes)
        rows = _span(rows for n, rows in sizes if rows and rows != n)
        parts.append(f"{group}: {prompts} prompts" + (f", {rows} rows" if rows else ""))
    return "; ".join(parts)


def _span(numbers: Iterable[int]) -> str:
    ordered = sorted(set(numbers))
    if len(ordered) < 2:
        return f"{ordered[0]:,}" if ordered else ""
    return f"{ordered[0]:,} to {ordered[-1]:,}"
