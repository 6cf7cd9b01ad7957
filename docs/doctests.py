"""Show doctests as code: a block of ``>>>`` lines without a heading would be read as a quotation."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Puts a heading before the doctests of every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite a docstring as soon as its object has been read."""
        if obj.docstring is None:
            return
        before, mark, after = obj.docstring.value.partition("\n>>> ")
        if mark:
            block = f">>> {after}".replace("\n", "\n    ")
            obj.docstring.value = f"{before}\nExamples:\n    {block}"
