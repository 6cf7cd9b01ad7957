"""What was compared, and where the numbers come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mechdiff.reporting.report.content import Cell, Section, Table, Text
from mechdiff.reporting.report.verdict import words
from mechdiff.reporting.report.view import View, count, span
from mechdiff.results import Record

REFERENCES = (
    "Kornblith et al. 2019, Similarity of Neural Network Representations Revisited "
    "(arXiv:1905.00414): linear CKA.",
    "Heimersheim and Nanda 2024, How to Use and Interpret Activation Patching (arXiv:2404.15255).",
    "Geiger et al. 2023, Finding Alignments Between Interpretable Causal Variables and Distributed Neural "
    "Representations (arXiv:2303.02536): interchange within a subspace.",
    "Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717).",
    "Wang et al. 2022, Interpretability in the Wild (arXiv:2211.00593): path patching.",
    "Syed et al. 2023, Attribution Patching Outperforms Automated Circuit Discovery (arXiv:2310.10348).",
    "Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark (arXiv:2504.13151): CPR and CMD.",
    "Clopper and Pearson 1934 (Biometrika 26) and Newcombe 1998 (Statistics in Medicine 17): "
    "intervals of rates.",
)


def setup(views: Sequence[View]) -> Section:
    """Write models, data and fairness from the provenance and the coverage records."""
    found = Section("setup", "Setup: models, data, fairness")
    head = ["", *(v.name for v in views)]
    rows: list[list[Cell]] = []

    def add(label: str, values: Sequence[object]) -> None:
        if any(v not in (None, "", "–") for v in values):
            rows.append([[label], *([str(v or "–")] for v in values)])

    add("base", [_model(v.pair.spec.get("base")) for v in views])
    add("tuned", [_model(v.pair.spec.get("tuned")) for v in views])
    add("domain", [v.pair.spec.get("domain") for v in views])
    add(
        "precision and device",
        [
            ", ".join(str(x) for x in (v.pair.provenance.get("dtype"), v.pair.provenance.get("device")) if x)
            for v in views
        ],
    )
    add("vocabulary: base, tuned, shared", [_vocabulary(v.pair.provenance) for v in views])
    add("tokenizer policy", [_policy(v.pair.spec) for v in views])
    add("prompt files", [", ".join(v.pair.provenance.get("prompts", {})) for v in views])
    add("prompts kept in RQ2", [_kept(v) for v in views])
    add("prompts per number", [span(v.pair.records()) for v in views])
    if rows:
        found.blocks.append(Table("What was compared.", head, rows))
    found.blocks.append(
        Text(
            [
                "Fairness: divergences are taken over tokens that both vocabularies hold; under the "
                "policy “shared vocab required” prompts with too few of them are left out. No patch "
                "and no steering edit touches the embedding; grafts and interpolated weights do. "
                "What each model says in tokens that the other lacks is lost to these numbers:"
            ]
        )
    )
    lost: list[list[Cell]] = []
    for view in views:
        for r in mass(view):
            label = " ".join(
                [
                    view.name,
                    r.model,
                    *(str(r.params[k]) for k in ("lang", "label", "benchmark") if k in r.params),
                ]
            )
            lost.append([[label], [view.number(r)], [count(r)]])
    if lost:
        found.blocks.append(
            Table(
                "Next-token mass on tokens that the other model lacks (descriptive; no control applies).",
                ["model and prompts", "lost mass", "n"],
                lost,
                detail=True,
            )
        )
    else:
        found.blocks.append(Text(["Lost mass was not measured."]))
    return found


def mass(view: View) -> list[Record]:
    """Return the lost mass of each model, by kind of prompt; one record per kind."""
    for question in ("rq2", "rq1"):  # the former by language alone
        found = [
            r
            for r in view.pair.select(question, quantity="new_token_mass", control="none")
            if r.model in ("base", "tuned") and r.value is not None and not r.site
        ]
        if found:
            return found[:8]
    return []


def _model(spec: Any) -> str:
    if not isinstance(spec, dict):
        return "–"
    name = str(spec.get("id", ""))
    if "wheel:" in name or os.path.isabs(name):  # where it lies on one machine says nothing
        name = name.rstrip("/").rpartition("/")[2]
    adapter = str(spec.get("adapter") or "").rstrip("/").rpartition("/")[2]
    return f"{name} + adapter {adapter}" if adapter else name


def _kept(view: View) -> str:
    """Write how many evaluation prompts had enough shared tokens, by language."""
    found = [
        r
        for r in view.pair.select("rq2", quantity="coverage", of="prompts")
        if "min_shared_coverage" in r.params
    ]
    return ", ".join(f"{r.params['lang']} {round(r.n * (r.value or 0)):,} of {r.n:,}" for r in found)


def _vocabulary(origin: dict[str, Any]) -> str:
    models = origin.get("models", {})
    sizes = [models.get(role, {}).get("vocabulary") for role in ("base", "tuned")]
    sizes.append(origin.get("shared_vocabulary"))
    return ", ".join("?" if s is None else f"{s:,}" for s in sizes) if any(sizes) else "–"


def _policy(spec: dict[str, Any]) -> str:
    policy = words(spec.get("tokenizer_policy", ""))
    return f"{policy}, coverage of at least {spec.get('min_shared_coverage')}" if policy else "–"


def provenance(views: Sequence[View]) -> Section:
    """Write where the numbers come from."""
    found = Section("provenance", "Provenance")
    rows: list[list[Cell]] = []
    for view in views:
        origin = view.pair.provenance
        about = {
            k: origin.get(k)
            for k in ("mechdiff", "commit", "seed", "python", "platform")
            if origin.get(k) is not None
        }
        said = ", ".join(f"{k} {v}" for k, v in about.items()) or "the records do not say"
        found.blocks.append(
            Text([f"{view.name}: {said}; questions {', '.join(view.pair.runs)}."], kind="item")
        )
        for question, run in view.pair.runs.items():
            origin = run.results.provenance
            packages = ", ".join(f"{k} {v}" for k, v in origin.get("packages", {}).items())
            layers = origin.get("layers") or {}
            source = (
                "a scan of rq1"
                if str(layers.get("from", "")).endswith(".json")
                else str(layers.get("from", "–"))
            )
            weights = ", ".join(
                f"{role} {str(m.get('weights'))[:12]}" for role, m in origin.get("models", {}).items()
            )
            columns = [
                origin.get("mechdiff"),
                origin.get("commit"),
                origin.get("seed"),
                source,
                weights,
                packages,
                run.name,
            ]
            rows.append(
                [[f"{view.name} {question}"], *([str(x) if x not in (None, "") else "–"] for x in columns)]
            )
    head = ["run", "mechdiff", "commit", "seed", "layers from", "weights", "packages", "records"]
    found.blocks.append(Table("One row per run.", head, rows, detail=True))
    return found
