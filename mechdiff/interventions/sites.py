"""Name one activation of one layer, and the parts of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from mechdiff.errors import SiteError, cut

Component = Literal["resid_post", "attn_out", "mlp_out", "head_z", "head_out"]
COMPONENTS: tuple[str, ...] = get_args(Component)

PREFIX, USER, SUFFIX, OTHER = range(4)
"""Regions of a prompt: the template before the user's text, that text, the template after it, and tokens that
belong to none of them alone."""
POSITIONS = ("last", "user", "template")
"""Groups of positions, each with maps of its own: the final token before the answer, tokens that end in the
user's text, and the other tokens of the chat template after it. The template before the user's text is the
same in every prompt and belongs to none."""

_PATTERN = re.compile(r"(?P<component>[a-z_]+)\.(?P<layer>[0-9]{1,6})")


@dataclass(frozen=True, order=True)
class Site:
    """One activation of one layer; prints and parses as ``resid_post.12``.

    Attributes:
        layer: Index of the block, from 0.
        component: ``resid_post`` is the output of the block, ``attn_out`` and ``mlp_out`` are module outputs,
            ``head_z`` is the input of the output projection split into query heads, ``head_out`` is each
            head's contribution to the residual, with the model's own output projection.
    """

    layer: int
    component: Component = "resid_post"

    def __str__(self) -> str:
        return f"{self.component}.{self.layer}"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a site from its name.

        Raises:
            SiteError: If the text is not ``<component>.<layer>`` with a known component.
        """
        if isinstance(text, Site):
            return text
        match = _PATTERN.fullmatch(str(text).strip())
        if match is None or match["component"] not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise SiteError(
                f"unknown site {cut(text)}; allowed: <component>.<layer>, component one of {known} "
                "(key: layers)"
            )
        return cls(int(match["layer"]), match["component"])  # type: ignore[arg-type]


def check_layers(sites: Iterable[Site], num_layers: int, key: str = "layers") -> None:
    """Refuse sites that a model does not have.

    Args:
        sites: The sites asked for.
        num_layers: Number of blocks of the model.
        key: Configuration key to name in the message.

    Raises:
        SiteError: If a layer lies outside ``0..num_layers - 1``.
    """
    for site in sites:
        if not 0 <= site.layer < num_layers:
            raise SiteError(
                f"site {site} is out of range; allowed layers: 0 to {num_layers - 1} (key: {key})"
            )
