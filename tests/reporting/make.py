"""Plausible records of a map run."""

import random

from mechdiff.results import Record, Results

Q = {"question": "rq2"}


def _around(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def map_run(layers: list[int], seed: int = 0) -> Results:
    """Records with a first site below the first changed weight, negative values and far-off controls."""
    rng = random.Random(seed)
    records: list[Record] = []
    for i, layer in enumerate(layers):
        depth = (i + 1) / len(layers)
        site, small = f"resid_post.{layer}", i == 0 and len(layers) > 1
        for group, rows in (("last", 131), ("user", 2711), ("template", 393)):
            cell = {"site": site, "positions": group, "n": 131, "rows": rows, "unit": "fraction"}
            params = {"solver": "ridge", "lambda_": 0.01}
            gap = 0.002 + 0.05 * depth * rng.uniform(0.5, 1.5)
            delta = {"last": 0.72, "user": 0.35, "template": -0.18}[group] * (0.4 + 0.6 * depth) + rng.gauss(
                0, 0.03
            )
            flags = ("lambda_at_edge",) if group == "template" else ()
            if small:
                records.append(
                    Record(
                        **Q, **cell, quantity="r2_delta", value=None, reason="gap_too_small", params=params
                    )
                )
                gap = 0.0005
            else:
                records.append(
                    Record(
                        **Q, **cell, quantity="r2_delta", **_around(delta, 0.05), params=params, flags=flags
                    )
                )
                for control, value in (("mean_shift", 0.12), ("shuffled", -0.06), ("wrong_layer", -3.4)):
                    value += rng.gauss(0, 0.02)
                    records.append(
                        Record(**Q, **cell, quantity="r2_delta", value=value, control=control, params=params)
                    )
                records.append(
                    Record(**Q, **cell, quantity="r2_delta", value=0.0, control="identity", params=params)
                )
            mapped = gap * (1 - max(delta, -0.5))
            records += [
                Record(**Q, **cell, quantity="r2", **_around(1 - mapped, mapped / 8), params=params),
                Record(
                    **Q, **cell, quantity="r2", **_around(1 - gap, gap / 8), control="identity", params=params
                ),
                Record(**Q, **cell, quantity="cka", value=0.9 + 0.09 * depth, params=params),
            ]
        for group in ("last", "all"):
            cell = {"site": site, "positions": group, "n": 120, "split": "eval", "unit": "nats"}
            raw = 0.0008 if small else (0.05 + 0.9 * depth**2) * (1.6 if group == "all" else 1.0)
            factor = 0.35 if group == "last" else 0.6
            records += [
                Record(**Q, **cell, quantity="kl_raw", **_around(raw, raw / 6)),
                Record(**Q, **cell, quantity="kl_mapped", **_around(raw * factor, raw / 10)),
                Record(**Q, **cell, quantity="kl_mapped", value=raw * 0.8, control="mean_shift"),
                Record(**Q, **cell, quantity="kl_mapped", value=raw * 1.1 + 0.02, control="shuffled"),
                Record(**Q, **cell, quantity="kl_mapped", value=raw * 2 + 1.5, control="wrong_layer"),
                Record(**Q, **cell, quantity="kl_raw", value=1.2e-7, control="self"),
            ]
            cell["unit"] = "fraction"
            into_base = {"direction": "into_base"}
            if small:
                records.append(
                    Record(**Q, **cell, quantity="kl_reduction", value=None, reason="gap_too_small")
                )
                records.append(
                    Record(
                        **Q,
                        **cell,
                        quantity="patch_agreement",
                        value=None,
                        reason="gap_too_small",
                        params=into_base,
                    )
                )
                continue
            records += [
                Record(**Q, **cell, quantity="kl_reduction", **_around(1 - factor, 0.05)),
                Record(
                    **Q,
                    **cell,
                    quantity="patch_agreement",
                    **_around(0.3 + 0.4 * depth, 0.08),
                    params=into_base,
                ),
                Record(
                    **Q,
                    **cell,
                    quantity="patch_agreement",
                    value=0.15,
                    control="mean_shift",
                    params=into_base,
                ),
                Record(
                    **Q,
                    **cell,
                    quantity="patch_agreement",
                    value=-7.5,
                    control="wrong_layer",
                    params=into_base,
                ),
                Record(
                    **Q,
                    **cell,
                    quantity="effect_correlation",
                    **_around(0.2 + 0.6 * depth, 0.1),
                    params=into_base,
                ),
            ]
    return Results(records, {"pair": {"name": "cultural_smol"}, "seed": 17})


def divergence_run(layers: list[int], seed: int = 0) -> Results:
    """Records of a run on where two models differ, with a change in the middle."""
    rng = random.Random(seed)
    q = {"question": "rq1"}
    records: list[Record] = []
    middle = layers[len(layers) // 2]
    for layer in layers:
        site, gone = f"resid_post.{layer}", max(0, layer - middle + 2) / (layers[-1] + 2)
        cell = {"site": site, "positions": "last", "n": 600, "rows": 600, "split": "all", "unit": "fraction"}
        own = {"source_site": site}
        for centred, factor in (({}, 0.4), ({"centred": "class+lang"}, 0.7)):
            for quantity, bias in (("cka", 0.6), ("cka_debiased", 1.0)):
                value = 1 - factor * bias * gone
                records.append(
                    Record(**q, **cell, quantity=quantity, **_around(value, 0.02), params={**own, **centred})
                )
        for other in layers:
            value = 1 - 0.02 * abs(layer - other) - 0.2 * gone
            params = {"source_site": f"resid_post.{other}", "matrix": True}
            records.append(Record(**q, **cell, quantity="cka_debiased", value=value, params=params))
        for contrast in ("tuned-reference", "base-reference", "tuned-base"):
            third = {"site": site, "positions": "last", "n": 40, "split": "eval", "unit": "fraction"}
            records.append(
                Record(
                    **q,
                    **third,
                    quantity="cka_debiased",
                    **_around(1 - 0.3 * gone, 0.05),
                    model="reference",
                    params={"contrast": contrast},
                )
            )
        for direction in ("into_tuned", "into_base"):
            for group in ("last", "all"):
                cell = {"site": site, "positions": group, "n": 40, "split": "eval", "unit": "fraction"}
                value = 0.0 if layer < middle else 0.5 + 0.45 * gone
                params = {"direction": direction, "prompts": "curve"}
                if direction == "into_base" and layer == layers[0]:
                    lost = {"value": None, "reason": "gap_too_small"}
                    records.append(Record(**q, **cell, quantity="patch_recovery", **lost, params=params))
                    continue
                records.append(
                    Record(**q, **cell, quantity="patch_recovery", **_around(value, 0.05), params=params)
                )
                if layer in layers[-2:]:
                    params = {**params, "prompts": "all"}
                    records.append(
                        Record(**q, **cell, quantity="patch_recovery", **_around(value, 0.05), params=params)
                    )
                    for control, level in (("other_prompt", 0.3), ("random", -0.6), ("wrong_layer", -4.0)):
                        value = level + rng.gauss(0, 0.05)
                        records.append(
                            Record(
                                **q,
                                **cell,
                                quantity="patch_recovery",
                                value=value,
                                control=control,
                                params=params,
                            )
                        )
    for rank, layer in enumerate(layers[:-3:-1], 1):
        chosen = {
            "quantity": "chosen_layer",
            "value": float(layer),
            "unit": "layer",
            "site": f"resid_post.{layer}",
        }
        records.append(
            Record(
                **q,
                **chosen,
                n=600,
                split="all",
                positions="last",
                params={"by": "cka_debiased", "rank": rank},
            )
        )
        for label in ("target", "neutral"):
            for control, value in (("none", -2.0), ("other_prompt", -0.7), ("random", 0.1)):
                effect = {
                    "quantity": "patch_effect",
                    **_around(value, 0.4),
                    "unit": "nats",
                    "control": control,
                }
                params = {"direction": "into_tuned", "label": label}
                where = {"site": f"resid_post.{layer}", "positions": "last", "n": 8, "split": "eval"}
                records.append(Record(**q, **effect, **where, params=params))
    records.append(
        Record(
            **q,
            quantity="chosen_layer",
            value=float(middle),
            n=40,
            unit="layer",
            site=f"resid_post.{middle}",
            split="eval",
            params={"by": "patch_recovery", "rank": 1},
            flags=("rankings_disagree",),
        )
    )
    for direction in ("into_tuned", "into_base"):
        onset = {"quantity": "patch_onset", "value": float(middle), "n": 40, "unit": "layer", "split": "eval"}
        params = {"direction": direction}
        records.append(Record(**q, **onset, site=f"resid_post.{middle}", positions="last", params=params))
    for model, rate in (("base", 0.05), ("tuned", 0.9)):
        for label, value in (("target", rate), ("neutral", 0.04)):
            cell = {"n": 40, "unit": "fraction", "split": "eval", "model": model}
            params = {"lang": "en", "label": label, "masking": False}
            records.append(
                Record(**q, **cell, quantity="refusal_rate", **_around(value, 0.04), params=params)
            )
            records.append(
                Record(**q, **cell, quantity="refusal_rate", value=value, params={**params, "masking": True})
            )
        cell["params"] = {"benchmark": "mc_kk", "format": "cloze", "masking": False}
        records.append(Record(**q, **cell, quantity="mc_acc", **_around(0.31, 0.1)))
        cell["params"] = {"benchmark": "toxicity_prompts", "masking": False}
        records.append(Record(**q, **cell, quantity="toxicity", value=None, reason="not_measured"))
    return Results(records, {"pair": {"name": "cultural_smol"}, "seed": 17})
