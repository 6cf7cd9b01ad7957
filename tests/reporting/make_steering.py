"""Plausible records of a steering run."""

from __future__ import annotations

import random
from typing import Any

from mechdiff.results import Record, Results

KS, ALPHAS = (1, 2, 4, 8), (0.1, 0.25, 0.5, 1.0, 2.0, 3.0)
SITE = "resid_post.21"
TEMPLATES = ("{text}", '"{text}"', "1) {text}", "# {text}\n\n---")


def _record(quantity: str, value: float | None, spread: float = 0.05, **about: Any) -> Record:
    if value is None:
        about = {"reason": "none_feasible", **about}
    ends = {} if value is None else {"low": value - spread, "high": value + spread}
    fixed: dict[str, Any] = {"question": "rq3", "site": SITE, "n": 80, "unit": "fraction", "split": "eval"}
    return Record(quantity=quantity, value=value, **{**fixed, "positions": "last", **ends, **about})


def steering_run(seed: int = 0) -> Results:
    """Records with a handle that grows with k, an edit without a feasible alpha, and controls."""
    rng, found = random.Random(seed), []
    for edit in ("interchange", "mapped", "amplify", "add"):
        for k in KS if edit != "add" else (1,):
            top = {"interchange": 0.9, "mapped": 0.8, "amplify": 0.1, "add": 0.3}[edit] * k / (k + 1.5)
            params = {"edit": edit, "k": k, "solver": "diff_mean" if edit == "add" else "paired_svd"}
            for alpha in ALPHAS:
                value = top * (1 - (alpha - 1.2) ** 2) if edit != "amplify" else top * (1 - alpha**2)
                cell = {"split": "dev", "n": 40, "params": {**params, "alpha": alpha}}
                found.append(_record("interchange_recovery", value + rng.gauss(0, 0.01), **cell))
            chosen = {**params, "alpha": 1.0}
            if edit == "amplify" and k > 2:
                found.append(_record("interchange_recovery", None, params=chosen))
                continue
            found += [
                _record("interchange_recovery", top, params=chosen),
                _record("steer_effect", top * 1.1, 0.1, params={**chosen, "metric": "refusal_logodds"}),
                Record(
                    "rq3",
                    "side_effect_bpb",
                    0.01 * k,
                    128,
                    "fraction",
                    high=0.012 * k,
                    site=SITE,
                    split="eval",
                    positions="last",
                    params=chosen,
                ),
                Record(
                    "rq3",
                    "side_effect_pp",
                    0.4 * k,
                    128,
                    "pp",
                    high=2.3 + 0.5 * k,
                    site=SITE,
                    split="eval",
                    positions="last",
                    params=chosen,
                ),
            ]
            if edit == "interchange":
                for draw, level in (("isotropic", 0.0), ("covariance", 0.05)):
                    high = level + 0.02 * k
                    found.append(
                        Record(
                            "rq3",
                            "interchange_recovery",
                            level,
                            12,
                            "fraction",
                            high=high,
                            site=SITE,
                            split="eval",
                            control="random",
                            positions="last",
                            params={**chosen, "draw": draw},
                        )
                    )
    found.append(
        _record("chosen_handle", 4.0, params={"edit": "mapped", "alpha": 1.0, "solver": "paired_svd"})
    )
    found += [*_gated(), *_transfer(), *_monitor(rng), *_heads(rng)]
    return Results(found, {"pair": {"name": "cultural_smol"}})


def _gated() -> list[Record]:
    """Costs of the chosen handle under a gate: the same cell as its own costs, but for the gate."""
    found = []
    for gate in ("none", "linear"):
        about = {"edit": "mapped", "k": 4, "solver": "paired_svd", "alpha": 1.0, "gate": gate}
        found.append(_record("side_effect_bpb", 0.777, n=64, params=about))
        found.append(_record("side_effect_pp", 77.7, 5.0, n=64, unit="pp", params=about))
    return found


def _transfer() -> list[Record]:
    found = []
    for edit in ("interchange", "mapped"):
        for fitted in ("kk", "en", "all"):
            for lang in ("en", "kk", "ru"):
                for template in TEMPLATES if fitted == "all" else TEMPLATES[:1]:
                    params = {"fitted_on": fitted, "lang": lang, "edit": edit, "template": template}
                    params |= {"k": 4, "alpha": 1.0, "masking": True, "metric": "recovery"}
                    value = None if lang == "ru" else 0.8 if fitted in (lang, "all") else 0.35
                    cell = {"reason": "gap_too_small"} if value is None else {}
                    found.append(_record("transfer_effect", value, n=24, params=params, **cell))
    return found


def _monitor(rng: random.Random) -> list[Record]:
    found = []
    for layer in range(0, 30, 2):
        for model in ("base", "tuned"):
            for lang in ("all", "en", "kk"):
                value = min(0.7 + 0.02 * layer + 0.05 * (model == "tuned"), 0.99)
                cell: dict[str, Any] = {
                    "site": f"resid_post.{layer}",
                    "model": model,
                    "params": {"lang": lang},
                }
                found.append(_record("probe_auroc", value, 0.02, **cell))
                cell["params"] = {"lang": lang, "draws": 20}
                found.append(
                    _record("probe_auroc", 0.5 + rng.gauss(0, 0.03), 0.12, control="shuffled", **cell)
                )
    return found


def _heads(rng: random.Random) -> list[Record]:
    found = []
    for number in range(64):
        group = "attribution" if number < 32 else "random"
        value = rng.gauss(0.05, 0.05) if group == "attribution" else rng.gauss(0, 0.01)
        for path, share in (("total", value), ("direct", 0.7 * value)):
            params = {"head": f"{number % 20}.{number % 9}", "group": group, "path": path, "k": 4}
            params |= {"mode": "swap", "metric": "projection"}
            params["head"] = f"{number % 20}.{number // 20}"
            found.append(_record("head_path_effect", share, 0.02, split="dev", n=12, params=params))
    return found
