"""How the source is read for the reference.

1. A block of ``>>>`` lines without a heading would be read as a quotation: it gets one.
2. A name is described where it is defined, not again in a package that only passes it on.
"""

from __future__ import annotations

from typing import Any

from griffe import Extension, Module, Object


class Api(Extension):
    """Rewrites docstrings, and forgets what packages export."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Look at an object once everything has been read."""
        if isinstance(obj, Module):
            obj.exports = None
        if obj.docstring is None:
            return
        before, mark, after = obj.docstring.value.partition("\n>>> ")
        if mark:
            block = f">>> {after}".replace("\n", "\n    ")
            obj.docstring.value = f"{before}\nExamples:\n    {block}"
