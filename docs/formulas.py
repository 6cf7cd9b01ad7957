"""Turn ``math`` fences into MathML when pages are built: a formula needs no script and no network."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return the MathML of a fence."""
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell the Markdown parser what a ``math`` fence is."""
    fence = {"name": "math", "class": "formula", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config
