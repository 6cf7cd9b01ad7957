"""What a handle is worth in use: yardsticks, other languages and wrappings, a gate, where to monitor."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff.reporting.cells import layer
from mechdiff.reporting.report.content import Cell, Table, Text
from mechdiff.reporting.report.view import View, count, span
from mechdiff.reporting.steering import handle_site
from mechdiff.results import Record


def yardsticks(view: View) -> list[Table]:
    """Write what a system prompt and interpolated weights do to the same prompts."""
    found = view.pair.select("rq3", quantity="interchange_recovery", control="none", split="eval")
    rows: list[list[Cell]] = []
    for r in found:
        edit, lambda_ = r.params.get("edit"), r.params.get("lambda_")
        if edit not in ("system_prompt", "weights", "weights_at_equal_cost"):
            continue
        if edit == "weights_at_equal_cost":
            label = f"weights at the bits per byte of {r.params['handle']}"
            label += "" if lambda_ is None else f": λ = {lambda_:.2g}"
            cost = r.params.get("cost")
            priced = "–" if cost is None else f"{100 * cost:+.1f} % (n = {r.params.get('cost_n', '?')})"
            rows.append([[label], [view.number(r)], ["–"], [priced], ["–"], [count(r)]])
            continue
        costs = [
            view.pair.one("rq3", quantity=q, edit=edit, lambda_=lambda_, control="none", split="eval")
            for q in ("steer_effect", "side_effect_bpb", "side_effect_pp")
        ]
        label = "system prompt" if edit == "system_prompt" else f"weights, λ = {lambda_:g}"
        rows.append([[label], [view.number(r)], *([view.number(c)] for c in costs), [count(r)]])
    head = ["yardstick", "recovery", "share of behaviour gap", "bits per byte", "neutral turned", "n"]
    return (
        [
            Table(
                "What a system prompt and interpolated weights achieve; n says on how many targets.",
                head,
                rows,
                detail=True,
            )
        ]
        if rows
        else []
    )


def _transferred(found: Sequence[Record], view: View) -> list[Text]:
    """Say what a handle keeps in another language than its own, and over wrappings of the prompt."""
    plain = {(r.params.get("fitted_on"), r.params.get("lang")): r for r in reversed(found)}
    said = []
    for (fitted, lang), r in sorted(plain.items(), key=lambda item: str(item[0])):
        own = plain.get((lang, lang))
        if fitted not in ("all", lang) and own is not None:
            parts = [
                f"Fitted on {fitted}, tested on {lang}: recovery ",
                view.number(r),
                f" (n = {r.n:,}), against ",
            ]
            said.append(Text([*parts, view.number(own), f" when fitted on {lang}."], kind="item"))
    wrapped = [r for r in found if r.params.get("fitted_on") == "all" and r.value is not None]
    for lang in dict.fromkeys(str(r.params.get("lang")) for r in wrapped):
        here = [r for r in wrapped if str(r.params.get("lang")) == lang]
        if len({r.params.get("template") for r in here}) < 2:
            continue
        least, most = (pick(here, key=lambda r: r.value or 0) for pick in (min, max))
        parts = [
            f"Over {len(here)} wrappings of the prompt ({lang}): from ",
            view.number(least),
            " to ",
            view.number(most),
        ]
        said.append(Text([*parts, f" (n = {span(here)})."], kind="item"))
    return said


def transfer(view: View) -> list[Table | Text]:
    """Write how a handle fitted on one language works on others, and under other wrappings of the prompt."""
    found = [
        r
        for r in view.pair.select("rq3", quantity="transfer_effect", control="none")
        if r.params.get("metric") == "recovery" and r.params.get("edit") in ("mapped", "interchange")
    ]
    if not found:
        return []
    edit = "mapped" if any(r.params["edit"] == "mapped" for r in found) else "interchange"
    site = handle_site(view.pair.runs["rq3"].results)
    sites = [r.site for r in found]
    site = site if site in sites else max(dict.fromkeys(sites), key=sites.count)
    rows: list[list[Cell]] = []
    for r in found:
        if r.params["edit"] != edit or r.site != site:
            continue
        wrapped = " ".join(str(r.params.get("template", "")).replace("{text}", "…").split())
        label = f"{r.params.get('fitted_on')} → {r.params.get('lang')}" + (
            f" as {wrapped}" if wrapped not in ("…", "") else ""
        )
        random = [
            c
            for c in view.pair.select("rq3", quantity="transfer_effect", control="random", site=site)
            if all(
                c.params.get(p) == r.params.get(p) for p in ("edit", "lang", "template", "metric", "masking")
            )
        ]
        rows.append(view.row(label, r, random[:1] or [None]))
    spoken = _transferred([r for r in found if r.params["edit"] == edit and r.site == site], view)
    first = next(r for r in found if r.params["edit"] == edit and r.site == site)
    which = "a default, not the chosen one" if "not_chosen" in first.flags else "as chosen"
    caption = (
        f"{view.name}: recovery by the {edit} handle (k = {first.params['k']}, α = "
        f"{first.params['alpha']:g}: {which}), fitted on → tested on; “as” names another wrapping "
        "of the prompt."
    )
    return [
        *spoken,
        Table(
            caption,
            ["fitted → tested", "recovery", "random subspace", "beyond random", "n"],
            rows,
            detail=True,
        ),
    ]


def gate(view: View) -> list[Table]:
    """Write what a probe that decides when to steer changes."""
    rows: list[list[Cell]] = []
    for name, said in (
        ("none", "always steer"),
        ("linear", "probe, then steer"),
        ("shuffled", "control: probe of shuffled classes"),
    ):
        about = {"gate": name, "split": "eval"}
        effect = view.pair.one("rq3", quantity="gated_effect", metric="recovery", **about)
        costs = [view.pair.one("rq3", quantity=q, **about) for q in ("side_effect_bpb", "side_effect_pp")]
        fires = [
            view.pair.one("rq3", quantity="gated_effect", metric="fires", label=x, **about)
            for x in ("target", "neutral")
        ]
        if effect is not None:
            rows.append([[said], *([view.number(r)] for r in (effect, *costs, *fires)), [count(effect)]])
    head = [
        "steering",
        "recovery",
        "bits per byte",
        "neutral turned",
        "fires on targets",
        "fires on neutral",
        "n",
    ]
    return [Table(f"{view.name}: conditional steering against steering always.", head, rows)] if rows else []


def monitor(view: View) -> list[Record]:
    """Return the probes with the highest AUROC in tuned, of all languages, by layer."""
    found = [
        r
        for r in view.pair.select("rq3", quantity="probe_auroc", control="none", model="tuned", lang="all")
        if r.value is not None
    ]
    most = max((r.value or 0 for r in found), default=0.0)
    return sorted((r for r in found if r.value == most), key=lambda r: layer(str(r.site)))
