"""A study as `mechdiff study` leaves it, with plausible records of both pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechdiff.results import Results
from tests.reporting.make import divergence_run, map_run
from tests.reporting.make_heads import head_run
from tests.reporting.make_steering import steering_run

QUESTIONS = ("rq1", "rq2", "rq3", "rq4")
DOMAINS = {"cultural_smol": "cultural", "cognitive_smol": "cognitive"}


def provenance(name: str, domain: str) -> dict[str, Any]:
    """Return what a run says of its pair."""
    models = {role: {"weights": f"{role}0123456789abcdef", "vocabulary": 49152} for role in ("base", "tuned")}
    return {
        "mechdiff": "0.1.0",
        "commit": "0123abc",
        "seed": 17,
        "dtype": "float32",
        "device": "cpu",
        "pair": {
            "name": name,
            "domain": domain,
            "base": {"id": "org/base"},
            "tuned": {"id": "org/base", "adapter": f"/somewhere/{name}"},
            "tokenizer_policy": "shared_vocab_required",
            "min_shared_coverage": 0.2,
        },
        "models": models,
        "shared_vocabulary": 49100,
        "packages": {"torch": "2.13.0"},
        "prompts": {"prompts_fit.jsonl": "0123"},
        "layers": {"from": "/somewhere/results.json", "by": "cka_debiased", "flags": []},
    }


def run_of(question: str, seed: int = 0) -> Results:
    """Return plausible records of a question, without a pair."""
    if question == "rq1":
        return divergence_run(list(range(0, 30, 2)), seed)
    if question == "rq2":
        return map_run([6, 12, 18, 24], seed)
    return steering_run(seed) if question == "rq3" else head_run(seed)


def study(folder: Path, pairs: Sequence[str] = tuple(DOMAINS), questions: Sequence[str] = QUESTIONS) -> Path:
    """Write a study of pairs and questions; return its folder."""
    contrasts = []
    for seed, name in enumerate(pairs):
        for question in questions:
            results = run_of(question, seed)
            contrasts += [r for r in results if r.quantity == "churn_difference"][: not seed]
            results.records = [r for r in results if r.quantity != "churn_difference"]
            results.provenance = provenance(name, DOMAINS.get(name, "cultural"))
            results.write(folder / name / question / "results.json")
    if len(pairs) > 1 and contrasts:
        Results(contrasts, {}).write(folder / "contrasts.json")
    return folder
