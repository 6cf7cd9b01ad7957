"""Write the templated prompt files from `prompt_families.yaml`.

1. A block with `templates` is a family: every template is crossed with every topic; `{0}` and `{1}` are the
   topic's case forms.
2. A block with `pairs` is hand-written: a target and the neutral twin that shares most of its words.
3. The output depends on the YAML file alone, so a second run gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def render() -> dict[str, str]:
    """Return the text of every generated file, by file name."""
    source = yaml.safe_load((HERE / "prompt_families.yaml").read_text(encoding="utf-8"))
    files = {}
    for name, spec in source.items():
        rows = [row for block in spec["blocks"] for row in _rows(spec["split"], block)]
        files[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


def main(folder: Path = HERE) -> None:
    """Write the files into `folder`."""
    for name, text in render().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _rows(split: str, block: dict[str, Any]) -> Iterator[dict[str, str | None]]:
    return _pairs(split, block) if "pairs" in block else _family(split, block)


def _pairs(split: str, block: dict[str, Any]) -> Iterator[dict[str, str | None]]:
    lang = block["lang"]
    for number, (topic, target, twin_topic, twin) in enumerate(block["pairs"], 1):
        template = f"{lang}-{split}-{number:02d}"
        ids = f"{lang}-{split}-t-{number:03d}", f"{lang}-{split}-n-{number:03d}"
        yield _row(ids[0], target, lang, "target", split, template, topic, ids[1])
        yield _row(ids[1], twin, lang, "neutral", split, template, twin_topic)


def _family(split: str, block: dict[str, Any]) -> Iterator[dict[str, str | None]]:
    name, lang = block["name"], block["lang"]
    for number, template in enumerate(block["templates"], 1):
        for index, topic in enumerate(block["topics"], 1):
            forms = topic.split(" | ")
            key = f"{lang}-{split}-{name.removeprefix(f'{split}-')}-{number}{index}"
            yield _row(
                key, template.format(*forms), lang, block["label"], split, f"{lang}-{name}-{number}", forms[0]
            )


def _row(
    key: str, text: str, lang: str, label: str, split: str, template: str, topic: str, twin: str | None = None
) -> dict[str, str | None]:
    return {
        "id": key,
        "text": text,
        "lang": lang,
        "label": label,
        "split": split,
        "template": template,
        "topic": topic,
        "twin": twin,
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
