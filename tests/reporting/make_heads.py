"""Plausible records of a run on heads, in the shapes that the figures read.

What one head has: site ``head_out.<layer>``, ``params["head"]`` = ``"<layer>.<head>"``. What all heads have
together: no site. How it was measured stands in every record:

* ``method``: ``attribution_patching``, ``grad_x_act``, ``integrated_gradients``, or ``patch`` (the exact effect);
* ``metric``: ``logit_diff``, ``logprob_correct``, ``refusal_logodds`` (nats), ``kl_other``, ``refusal`` (pp);
* ``baseline``: what stands in the head's place: ``twin``, ``other_model``, ``zero``, ``mean``, ``resample``.

Figures draw the combination of the first ``head_attribution`` of the pair, so the main one is written first.

| quantity | where | params beside these |
|---|---|---|
| head_attribution | head; model base, tuned, pair (tuned − base) | method ``patch``: group ``attribution`` or ``random``; subset ``patched``: the estimate over the patched prompts alone |
| head_own_change | head; method ``own_change`` | metric ``norm`` or the target; kind ``own`` |
| head_inherited | head; method ``state_difference``, baseline ``other_model`` | the same; kind ``inherited`` |
| graft_recovery | head | method ``graft``, baseline ``weights``, metric ``recovery``, group ``own_change`` or ``random`` (control random); shares_kv: heads that change with it |
| completeness_error | head_out.<layer> without head, per model | |
| churn_p | head: family-wise p of one head | |
| churn | share; controls label_swap (pair), split_half (base, tuned): mean, 5th to 95th percentile of draws | rule ``bound``: floor, floor_from ``seed``, ``label_swap``, ``curve``; rule ``z``: floor 2.0, flag grows_with_n |
| churn_bh, churn_p | share of heads with adjusted p of at most ``level`` | level |
| topk_overlap, jaccard | base against tuned; control chance (exact range), split_half (base: of itself, pair: of tuned) | k |
| rbo | the same | persistence |
| cumulative_effect | control random: mean of draws, 5th to 95th percentile | k; of ``all_heads``, or ``gap`` at the last k |
| cpr, cmd | control random | |
| concentration | number of heads; control label_swap | share |
| truth_r | method ``patch``; over heads tried, per model patched | group ``all``, ``attribution``, ``random`` |
| truth_overlap | | k; among: number of heads patched |
| churn_difference | of two pairs; flag one_sibling_per_class | pairs, rule, floor_from |

Edges have the records of churn, with ``of`` = ``edges``.
"""  # noqa: E501 - a table

from __future__ import annotations

import random
from typing import Any

from mechdiff.results import Record, Results

LAYERS, HEADS = 30, 9
N = LAYERS * HEADS
MAIN = {"method": "attribution_patching", "metric": "logit_diff", "baseline": "twin"}
PATCH = {"method": "patch"}
CHANGED = {(17, 3): 0.9, (20, 1): -0.8, (21, 7): 0.55, (12, 5): -0.4, (25, 0): 0.3}
KS = (1, 3, 5, 14, 27, 54, 135, 270)


def _record(quantity: str, value: float | None, spread: float | None = None, **about: Any) -> Record:
    if value is None:
        about = {"reason": "gap_too_small", **about}
    ends = {} if value is None or spread is None else {"low": value - spread, "high": value + spread}
    fixed: dict[str, Any] = {"question": "rq4", "n": 48, "unit": "fraction", "split": "eval"}
    about["params"] = {**MAIN, **about.get("params", {})}
    return Record(quantity=quantity, value=value, **{**fixed, "positions": "all", **ends, **about})


def head_run(seed: int = 0) -> Results:
    """Records of a pair in which five heads changed."""
    rng = random.Random(seed)
    found = [*_heads(rng), *_churn(), *_rankings(), *_cumulative(), *_truth(rng)]
    return Results(found, {"pair": {"name": "cultural_smol"}})


def identical_run() -> Results:
    """Records of two identical models: no head changed, and no share of nothing."""
    found = []
    for layer in range(2):
        for head in range(3):
            where = {"site": f"head_out.{layer}", "params": {"head": f"{layer}.{head}"}, "unit": "nats"}
            for model in ("base", "tuned"):
                found.append(_record("head_attribution", 0.1 * head, 0.02, model=model, **where))
            found.append(_record("head_attribution", 0.0, 0.0, **where))
    for origin, floor in (("label_swap", 0.0), ("seed", 0.5)):
        found.append(_share(0.0, 0.0, rule="bound", floor=floor, floor_from=origin))
    found += [_record("cumulative_effect", None, params={"k": k, "of": "all_heads"}) for k in (1, 6)]
    found += [_record(area, None) for area in ("cpr", "cmd")]
    return Results(found, {"pair": {"name": "copied"}})


def _heads(rng: random.Random) -> list[Record]:
    found = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            size = 0.6 if rng.random() < 0.06 else 0.02
            base, change = rng.gauss(0, size), CHANGED.get((layer, head), rng.gauss(0, 0.015))
            where = {"site": f"head_out.{layer}", "unit": "nats"}
            name = {"head": f"{layer}.{head}"}
            values = {"pair": change, "base": base, "tuned": base + change}
            for model, value in values.items():
                spread = 0.02 + 0.25 * abs(value)
                found.append(_record("head_attribution", value, spread, model=model, params=name, **where))
            own = abs(change) if (layer, head) in CHANGED else 0.0
            norm = {**name, "metric": "norm"}
            own_norm = {"params": {**norm, "method": "own_change", "kind": "own"}, "unit": "fraction"}
            found.append(_record("head_own_change", own, 0.1 * own, site=where["site"], **own_norm))
            whole = {"params": {**norm, "method": "state_difference", "kind": "inherited"}}
            found.append(_record("head_inherited", own + 0.05, 0.02, site=where["site"], **whole))
            if own or (layer % 4, head) == (0, 2):
                shared = [f"{layer}.{h}" for h in range(head - head % 3, head - head % 3 + 3)]
                graft = {**name, "method": "graft", "baseline": "weights", "metric": "recovery"}
                drawn = {"group": "own_change" if own else "random", "shares_kv": shared}
                about: dict[str, Any] = {"site": where["site"], "params": {**graft, **drawn}}
                about["control"] = "none" if own else "random"
                value = None if layer == 28 else 0.3 * own
                found.append(_record("graft_recovery", value, 0.04, **about))
            found.append(_record("churn_p", 0.001 if own else 0.4, site=where["site"], unit="p", params=name))
        missed = layer in (0, 1)
        for model in ("base", "tuned"):
            params = {"method": "integrated_gradients"}
            flags = ("completeness_missed",) if missed else ()
            cell: dict[str, Any] = {"site": f"head_out.{layer}", "model": model, "params": params}
            found.append(_record("completeness_error", 0.3 if missed else 0.004, flags=flags, **cell))
    return found


def _share(value: float, spread: float = 0.02, **params: Any) -> Record:
    ends = {"low": max(0.0, value - spread), "high": min(1.0, value + spread)}
    flags = ("grows_with_n",) if params.get("rule") == "z" else ()
    return _record("churn", value, params=params, flags=flags, **ends)


def _null(control: str, value: float, model: str = "pair", quantity: str = "churn", **params: Any) -> Record:
    ends = {"low": max(0.0, 0.6 * value), "high": 1.5 * value}
    about: dict[str, Any] = {"control": control, "model": model, "params": {**params, "draws": 100}}
    return _record(quantity, value, **about, **ends)


def _churn() -> list[Record]:
    found = []
    for origin, floor, value in (("seed", 0.5, 3 / N), ("label_swap", 0.03, 9 / N)):
        about = {"rule": "bound", "floor": floor, "floor_from": origin}
        found += [_share(value, **about), _null("label_swap", 0.001 if floor < 0.5 else 0.0, **about)]
        found += [_null("split_half", 0.02 if floor < 0.5 else 0.0, m, **about) for m in ("base", "tuned")]
    about = {"rule": "z", "floor": 2.0}
    found += [_share(0.16, 0.05, **about), _null("label_swap", 0.048, **about)]
    found += [_null("split_half", 0.05, model, **about) for model in ("base", "tuned")]
    found += [_record("churn_bh", 11 / N, 0.02, params={"level": 0.05})]
    found += [_record("churn_p", 6 / N, 0.01, params={"level": 0.05})]
    for i in range(16):
        floor = 0.004 * 1.5**i
        about = {"rule": "bound", "floor": floor, "floor_from": "curve"}
        value = 0.12 / (1 + (floor / 0.02) ** 1.2)
        found += [_share(value, 0.3 * value, **about)]
        null = 0.05 / (1 + (floor / 0.006) ** 3)
        found += [_null("label_swap", null, **about)]
        found += [_null("split_half", 2 * null, model, **about) for model in ("base", "tuned")]
    for share, count in ((0.5, 6.0), (0.8, 31.0)):
        found.append(_record("concentration", count, 3.0, unit="heads", params={"share": share}))
        swapped = {"control": "label_swap", "params": {"share": share, "draws": 100}, "unit": "heads"}
        found.append(_record("concentration", 60 + 120 * (share - 0.5), 8.0, **swapped))
    contrast = {"pairs": ["cultural_smol", "cognitive_smol"], "rule": "bound", "floor_from": "label_swap"}
    flag = ("one_sibling_per_class",)
    return [*found, _record("churn_difference", 0.04, 0.03, params=contrast, flags=flag, n=96)]


def _rankings() -> list[Record]:
    found = []
    for k, overlap in ((5, 0.6), (10, 0.7), (20, 0.75), (32, 0.78)):
        for quantity, value, chance in (
            ("topk_overlap", overlap, k / N),
            ("jaccard", overlap / (2 - overlap), k / (2 * N - k)),
        ):
            found.append(_record(quantity, value, 0.1, params={"k": k}))
            about: dict[str, Any] = {"control": "chance", "low": 0.0, "high": 3 * chance}
            found.append(_record(quantity, chance, params={"k": k}, **about))
            found.append(_null("split_half", 0.62, "base", quantity, k=k))
            found.append(_null("split_half", 0.58, "pair", quantity, k=k))
    found.append(_record("rbo", 0.71, 0.07, params={"persistence": 0.9}))
    found.append(_record("rbo", 0.037, control="chance", params={"persistence": 0.9}))
    found.append(_null("split_half", 0.55, "base", "rbo", persistence=0.9))
    found.append(_null("split_half", 0.5, "pair", "rbo", persistence=0.9))
    return found


def _cumulative() -> list[Record]:
    found = []
    for k in KS:
        share = k / N
        params = {"k": k, "of": "all_heads"}
        value = 1.0 if k == N else 1.1 * (1 - 2.718 ** (-40 * share)) - 0.1 * share
        found.append(_record("cumulative_effect", value, 0.08 * (k < N), params=params))
        spread = 0.3 * (share * (1 - share)) ** 0.5
        random_order = {"control": "random", "params": {**params, "draws": 20}}
        found.append(_record("cumulative_effect", share, spread, **random_order))
    found.append(_record("cumulative_effect", 0.7, 0.1, params={"k": N, "of": "gap"}))
    for quantity, value in (("cpr", 0.99), ("cmd", 0.06)):
        found.append(_record(quantity, value, 0.03))
        found.append(_record(quantity, 0.5, 0.05, control="random", params={"draws": 20}))
    return found


def _truth(rng: random.Random) -> list[Record]:
    found = []
    for model in ("tuned", "base"):
        cells = [r for r in _heads(random.Random(0)) if r.quantity == "head_attribution" and r.model == model]
        by_size = sorted(cells, key=lambda r: -abs(r.value or 0))
        groups = {"attribution": by_size[:32], "random": rng.sample(by_size[32:], 32)}
        for group, estimates in groups.items():
            for r in estimates:
                value = (r.value or 0) * 0.9 + rng.gauss(0, 0.03)
                params = {"head": r.params["head"], **PATCH, "group": group}
                about: dict[str, Any] = {"site": r.site, "model": model, "unit": "nats"}
                found.append(_record("head_attribution", value, 0.05, params=params, **about))
                same = {"head": r.params["head"], "subset": "patched"}
                found.append(_record("head_attribution", 1.02 * (r.value or 0), 0.05, params=same, **about))
        for group, value in (("all", 0.93), ("attribution", 0.94), ("random", 0.4)):
            rows = 64 if group == "all" else 32
            about = {"model": model, "unit": "correlation", "rows": rows}
            found.append(_record("truth_r", value, 0.05, params={**PATCH, "group": group}, **about))
        found.append(_record("truth_overlap", 0.9, 0.08, model=model, params={**PATCH, "k": 20, "among": 64}))
    return found
