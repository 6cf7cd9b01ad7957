"""A handle in a file: the tensors of one edit and what it was made for, as safetensors.

1. Tensors, float32: `basis` `(k, d)`, and what the kind needs beside it: `delta` for `add`, `map_weight` and
   `map_bias` for `mapped`, `neutral` for `ablate`.
2. The header holds a manifest, one JSON object of texts and numbers. Nothing in the file is ever executed.
3. Only edits that need no second model can be written: those that move a state to where the other model has
   it, read from that model while it runs, cannot leave their pair.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mechdiff.errors import FitError, HandleError, SiteError, cut
from mechdiff.files import whole
from mechdiff.functional.clt import AffineMap
from mechdiff.functional.edits import Known, change, check_edit
from mechdiff.functional.steering import orthonormal
from mechdiff.interventions.sites import Site

FORMAT = "mechdiff.handle"
VERSION = 1
NEEDS = {"add": ("delta",), "mapped": ("map_weight", "map_bias"), "amplify": (), "ablate": ("neutral",)}
"""Kinds that can be written, and the tensors that each needs beside its basis."""
PARTS = {"basis", *(name for names in NEEDS.values() for name in names)}
ROLES = {"add": "base", "mapped": "base", "amplify": "base", "ablate": "tuned"}
"""The model of the pair that each kind is for."""
RULES = ("answer", "all")
"""Where a handle acts: the last token of the prompt and every token of the answer, or every token but the
first."""
COMPONENTS = ("resid_post", "attn_out", "mlp_out")
"""Activations of the width of the residual."""
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Manifest:
    """What a handle is and what it was made for.

    Attributes:
        site: Where it acts, such as ``resid_post.12``.
        kind: What is done there.
        k: Number of directions.
        alpha: Strength; 1 is the whole natural edit.
        width: Width of the states.
        model: Role of the model that it is for, ``base`` or ``tuned``.
        weights: Hash of that model in memory; see ``weights_hash``.
        fingerprint: Hash of that model's files, as the run states it.
        positions: Which tokens are edited, one of ``RULES``.
        solver: Who found the directions.
        provenance: Where it comes from.
        version: Of this format.
    """

    site: str
    kind: str
    k: int
    alpha: float
    width: int
    model: str
    weights: str
    fingerprint: str
    positions: str = "answer"
    solver: str = ""
    provenance: dict[str, str | int | float | None] = field(default_factory=dict)
    version: int = VERSION


@dataclass(frozen=True)
class Handle:
    """One edit at one site, with all that it needs.

    Attributes:
        manifest: What it is.
        known: Its tensors.
    """

    manifest: Manifest
    known: Known

    @property
    def site(self) -> Site:
        """Where it acts."""
        return Site.parse(self.manifest.site)

    def to(self, device: torch.device) -> Handle:
        """Return the handle with its tensors on a device."""
        moved = (None if part is None else _moved(part, device) for part in self.known)
        return Handle(self.manifest, Known(*moved))  # type: ignore[arg-type]

    def change(self, h: Tensor, alpha: float | None = None) -> Tensor:
        """Edit states.

        Args:
            h: `(..., d)`.
            alpha: Strength; the handle's own by default.

        Raises:
            FitError: If the strength is not allowed.
        """
        alpha = self.manifest.alpha if alpha is None else alpha
        return change(h, self.manifest.kind, self.known, alpha=alpha)


def check_kind(kind: str) -> None:
    """Refuse an edit that cannot leave its pair.

    Raises:
        HandleError: If it cannot, or does not exist.
    """
    if kind in NEEDS:
        return
    why = ", which needs the states of the other model" if kind in ("interchange", "reverse") else ""
    allowed = ", ".join(f"{name} (in {ROLES[name]})" for name in NEEDS)
    raise HandleError(f"edit is {cut(kind)}{why}; allowed: {allowed} (key: edit)")


def write(path: str | Path, handle: Handle) -> Path:
    """Write a handle, whole or not at all.

    Args:
        path: Where to.
        handle: What to write.

    Raises:
        HandleError: If the handle is not one that `read` would accept.
    """
    path, known = Path(path), handle.known
    _check(handle, str(path))
    weight, bias = known.affine or (None, None)
    parts = {"delta": known.delta, "neutral": known.neutral, "map_weight": weight, "map_bias": bias}
    kept = {"basis": known.basis} | {name: parts[name] for name in NEEDS[handle.manifest.kind]}
    tensors = {n: t.detach().cpu().to(torch.float32).contiguous() for n, t in kept.items() if t is not None}
    header = {"format": FORMAT, "manifest": json.dumps(asdict(handle.manifest), allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_bytes(save(tensors, metadata=header))
    return path


def read(path: str | Path) -> Handle:
    """Read a handle written by `write`; nothing in the file is executed.

    Args:
        path: A safetensors file.

    Raises:
        HandleError: If the file is missing, is not a handle, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise HandleError(f"{path} is not a file; give a handle written by `mechdiff export` (key: path)")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for name in (found := PARTS.intersection(file.keys())):
                if (kind := file.get_slice(name).get_dtype()) != "F32":
                    raise HandleError(f"{path} has {name} of {kind}; allowed: F32 (key: {name})")
            tensors = {name: file.get_tensor(name) for name in found}
    except OSError as error:
        raise HandleError(f"cannot read {path}: {error.strerror} (key: path)") from error
    except SafetensorError as error:
        with path.open("rb") as raw:
            pickled = raw.read(4).startswith(_PICKLED)
        what = "is a pickled file, which is never read" if pickled else "is not a safetensors file"
        raise HandleError(f"{path} {what}; allowed: a file of `mechdiff export` (key: path)") from error
    handle = Handle(_manifest(header, str(path)), _known(tensors))
    _check(handle, str(path))
    return handle


def _manifest(header: Mapping[str, str], path: str) -> Manifest:
    """Read the manifest of a file.

    Raises:
        HandleError: If it has none, another version, or a value of another type.
    """
    if header.get("format") != FORMAT:
        raise HandleError(f"{path} holds no handle; allowed: a file of `mechdiff export` (key: path)")
    try:
        body: Any = json.loads(header["manifest"])
        version = body["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise HandleError(f"{path} has no manifest; write it again with `mechdiff export`") from error
    if version != VERSION or isinstance(version, bool):
        raise HandleError(f"{path} has format version {cut(version)}; allowed: {VERSION} (key: path)")
    types = {"k": int, "width": int, "version": int, "alpha": (int, float), "provenance": dict}
    for name in (f.name for f in fields(Manifest)):
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, types.get(name, str)):  # type: ignore[arg-type]
            raise HandleError(f"{path} has {name} {cut(value)} in its manifest (key: path)")
    if not abs(body["alpha"]) <= sys.float_info.max:  # which a whole number of JSON may exceed
        raise HandleError(f"{path} has alpha {cut(body['alpha'])}; allowed: a finite number (key: alpha)")
    return Manifest(**{f.name: body[f.name] for f in fields(Manifest)} | {"alpha": float(body["alpha"])})


def _known(tensors: Mapping[str, Tensor]) -> Known:
    weight, bias = tensors.get("map_weight"), tensors.get("map_bias")
    affine = None if weight is None or bias is None else AffineMap(weight, bias)
    return Known(tensors.get("basis"), tensors.get("delta"), tensors.get("neutral"), affine)


def _check(handle: Handle, path: str) -> None:
    """Refuse a handle that contradicts itself.

    Raises:
        HandleError: If it does.
    """
    m, known = handle.manifest, handle.known
    check_kind(m.kind)
    try:
        site = Site.parse(m.site)
        check_edit(m.kind, m.alpha)
    except (SiteError, FitError) as error:
        raise HandleError(f"{path}: {error}") from error
    most = 1 if m.kind == "add" else m.width
    for key, value, allowed, fine in (
        ("site", m.site, f"{', '.join(COMPONENTS)} of a layer", site.component in COMPONENTS),
        ("positions", m.positions, ", ".join(RULES), m.positions in RULES),
        ("alpha", m.alpha, "a finite number", math.isfinite(m.alpha)),
        ("k", m.k, f"1 to {most}", 1 <= m.k <= most),
    ):
        if not fine:
            raise HandleError(
                f"{path} has {key} {cut(value)} with edit {m.kind}; allowed: {allowed} (key: {key})"
            )
    d = m.width
    shapes = {"basis": (m.k, d), "delta": (d,), "neutral": (d,), "map_weight": (d, d), "map_bias": (d,)}
    weight, bias = known.affine or (None, None)
    found = {**known._asdict(), "map_weight": weight, "map_bias": bias}
    for name in ("basis", *NEEDS[m.kind]):
        part = found[name]
        if part is None or tuple(part.shape) != shapes[name] or not part.isfinite().all():
            got = "none" if part is None else f"{tuple(part.shape)}, or a value that is not finite"
            raise HandleError(f"{path} has {name} {got}; allowed: {shapes[name]}, finite (key: {name})")
    assert known.basis is not None
    try:
        orthonormal(known.basis)
    except FitError as error:
        raise HandleError(f"{path}: {error}") from error


def _moved(part: Tensor | AffineMap, device: torch.device) -> Tensor | AffineMap:
    return part.to(device) if isinstance(part, Tensor) else AffineMap(*(t.to(device) for t in part))
