"""A folder as a user has it: two tiny models, prompt files and a pair file on disk; and runs in it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from mechdiff.cli import main
from tests.models import tiny_config
from tests.toys import PLAIN, prompts, tokenizer

ROOT = Path(__file__).parents[1]
OPENINGS = [
    (kind, " ".join([start, end]))
    for kind, starts in (("refuse", ("please no", "why do")), ("comply", ("tell me", "list facts")))
    for start in starts
    for end in ("now", "on snow", "in May", "so much")
]
SWEEP = {
    "ks": [1, 2],
    "alphas": [1.0],
    "max_dev": 16,
    "max_eval": 16,
    "max_neutral": 16,
    "min_neutral": 4,
    "answer_chars": 8,
    "graded_prompts": 2,
    "generated_prompts": 2,
    "draws": 2,
    "random_eval": 2,
}
"""A short sweep over edits, which reads as many prompts however many there are."""


def save_model(
    folder: Path, arch: str = "llama", noise: float = 0.0, layers: int = 4, size: int = 300, **config: Any
) -> Path:
    """Save a random model with a trained tokenizer; `noise` tells a tuned model from its base."""
    fast = tokenizer(size, PLAIN)
    settings = tiny_config(arch, layers)
    settings.vocab_size = len(fast) + (arch == "qwen2")  # whose tokenizer class adds a token of its own
    setattr(settings, "n_positions" if arch == "gpt2" else "max_position_embeddings", 512)
    for name, value in config.items():
        setattr(settings, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
        draws = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=draws)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def save_prompts(folder: Path, families: int = 3) -> list[str]:
    """Write prompts for fits and evaluations, and openings; return the names of the prompt files."""
    found = prompts(families)
    held = [p for p in found if p.template.endswith("t0") and p.topic.endswith("s0")]
    rows = {
        "fit.jsonl": found,
        "dev.jsonl": [replace(p, id=f"dev-{p.id}", split="dev", text=f"{p.text} now") for p in held],
        "eval.jsonl": [replace(p, id=f"eval-{p.id}", split="eval", text=f"{p.text} then") for p in held],
    }
    for name, items in rows.items():
        lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    openings = [{"lang": lang, "kind": k, "text": t} for lang in ("en", "kk") for k, t in OPENINGS]
    (folder / "openings.jsonl").write_text("\n".join(map(json.dumps, openings)))
    return list(rows)


def write_pair(folder: Path, name: str = "pair.yaml", **more: Any) -> Path:
    """Write a pair file whose paths are relative to it."""
    body = {
        "name": "tiny",
        "base": {"id": "./base"},
        "tuned": {"id": "./tuned"},
        "prompts": ["fit.jsonl", "dev.jsonl", "eval.jsonl"],
        "openings": "openings.jsonl",
    }
    path = folder / name
    path.write_text(yaml.safe_dump(body | more))
    return path


def workspace(folder: Path, arch: str = "llama") -> Path:
    """Make the folder; return its pair file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "base", arch)
    save_model(folder / "tuned", arch, noise=0.02)
    save_prompts(folder)
    return write_pair(folder)


def run(verb: str, *args: object) -> int:
    """Run a verb in process; return its exit code."""
    try:
        return main(verb, [str(arg) for arg in args])
    except SystemExit as left:
        return int(left.code or 0)


def config(name: str = "clt_cultural") -> list[str]:
    """Return the options that select a shipped configuration, without its progress bars."""
    return ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.enable_progress_bar=false"]


def called(path: str = "", **given: object) -> str:
    """Return the option that gives a trainer one callback of some class, or none."""
    few = [{"class_path": path, "init_args": given}] if path else []
    return f"--trainer.callbacks={json.dumps(few)}"


def small(pair: Path, root: Path) -> list[str]:
    """Return the options of a real run on a tiny pair that leaves all it makes under `root`."""
    return [
        "--pair",
        str(pair),
        "--layers=[1, 2]",
        "--data.tokens=null",
        "--trainer.accelerator=cpu",
        f"--extraction.root={root / 'stores'}",
        f"--trainer.logger.save_dir={root / 'runs'}",
    ]


def everything(folder: Path) -> set[str]:
    """List what a folder holds."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
