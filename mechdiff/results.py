"""Record, Results: the one tidy table that every run writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from mechdiff.errors import ConfigError, cut, printable
from mechdiff.files import write_text

SCHEMA = 1

Question = Literal["rq1", "rq2", "rq3", "rq4"]

QUANTITIES: dict[str, frozenset[str]] = {
    "rq1": frozenset(
        """
        refusal_rate refusal_logodds style_markers toxicity mc_acc mc_acc_norm mc_acc_bytes
        logprob_correct exact_match bias_score bits_per_byte new_token_mass cka cka_debiased patch_kl
        patch_recovery patch_effect patch_increment patch_onset chosen_layer coverage graft_kl graft_recovery
        weight_change weight_share weight_rank interpolation_kl interpolation_effect unparsed pwcca
        """.split()  # noqa: SIM905 - reads better than 30 quoted words
    ),
    "rq2": frozenset(
        """
        r2 r2_median r2_delta cka cka_debiased cosine coverage kl_raw kl_mapped kl_reduction
        patch_agreement effect_correlation new_token_mass
        """.split()  # noqa: SIM905 - reads better than 13 quoted words
    ),
    "rq3": frozenset(
        """
        steer_effect ablate_effect interchange_recovery side_effect_pp side_effect_bpb probe_auroc
        minimal_k_10 minimal_k_20 minimal_k_90 transfer_effect gated_effect wrong_way
        chosen_handle edit_norm energy_share principal_angle head_path_effect coverage
        """.split()  # noqa: SIM905 - reads better than 18 quoted words
    ),
    "rq4": frozenset(
        """
        head_attribution head_own_change head_inherited graft_recovery completeness_error
        churn churn_bh churn_p topk_overlap jaccard rbo cumulative_effect cpr cmd truth_r truth_overlap
        concentration churn_difference
        """.split()  # noqa: SIM905 - reads better than 18 quoted words
    ),
}
CONTROLS = frozenset(
    """
    none identity mean_shift shuffled wrong_layer random self zero mean other_prompt label_swap
    split_half chance majority_letter base_vs_base
    """.split()  # noqa: SIM905
)
_KINDS: dict[str, Any] = {
    "question quantity unit split control model": str,
    "site positions reason": (str, NoneType),
    "value low high": (float, int, NoneType),
    "n": int,
    "rows": (int, NoneType),
    "params": dict,
}
"""Types of the attributes of a record in a file."""
PROPOSES, ENTERS, DISAGREE = "cka_debiased", "patch_increment", "rankings_disagree"
"""What the layers that a scan chose are chosen by, and its flag where two ways to rank them disagree."""


@dataclass(frozen=True)
class Record:
    """One number with its doubt.

    Attributes:
        question: The research question that it answers.
        quantity: What was measured, one of ``QUANTITIES[question]``.
        value: The estimate, or None with a ``reason``.
        n: Number of prompts behind it.
        unit: ``fraction``, ``nats``, ``pp``, ``layer`` and the like.
        low: Lower end of the 95 % interval, None where there is none.
        high: Upper end.
        site: Activation site such as ``resid_post.12``, None for the whole model.
        split: ``test``, ``dev``, ``eval`` and the like.
        control: ``none`` for the quantity itself, else which control this is.
        params: What else identifies the cell (solver, k, alpha, direction, ...).
        model: ``base``, ``tuned``, ``reference`` or ``pair``.
        positions: ``last``, ``user``, ``template`` or ``all``.
        flags: Warnings about this number, each a short word.
        reason: Why ``value`` is None.
        rows: Number of activation rows, where it differs from ``n``.
    """

    question: Question
    quantity: str
    value: float | None
    n: int
    unit: str
    low: float | None = None
    high: float | None = None
    site: str | None = None
    split: str = "test"
    control: str = "none"
    params: dict[str, Any] = field(default_factory=dict)
    model: str = "pair"
    positions: str | None = None
    flags: tuple[str, ...] = ()
    reason: str | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        assert self.quantity in QUANTITIES[self.question], (
            f"{self.quantity} is not a quantity of {self.question}"
        )
        assert self.control in CONTROLS, f"{self.control} is not a control"
        assert (self.value is None) == (self.reason is not None), (
            f"{self.quantity}: a missing value needs a reason, and only that"
        )
        for number in (self.value, self.low, self.high):
            assert number is None or math.isfinite(number), f"{self.quantity} at {self.site} is {number}"
        object.__setattr__(self, "flags", tuple(self.flags))

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the record among those of a run."""
        parts = (
            self.question,
            self.quantity,
            self.site,
            self.positions,
            self.model,
            self.split,
            self.control,
        )
        return (*map(str, parts), json.dumps(self.params, sort_keys=True))


class Results:
    """The records of a run and where they come from.

    Args:
        records: The table.
        provenance: Versions, seed, pair, hashes, device.
    """

    def __init__(self, records: Iterable[Record] = (), provenance: dict[str, Any] | None = None) -> None:
        self.records = list(records)
        self.provenance = dict(provenance or {})

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def select(self, **where: Any) -> list[Record]:
        """Return the records whose attributes, or entries of ``params``, equal all of ``where``."""
        names = {f.name for f in fields(Record)}
        return [
            r
            for r in self.records
            if all((getattr(r, k) if k in names else r.params.get(k)) == v for k, v in where.items())
        ]

    def write(self, path: str | Path) -> Path:
        """Write the table as JSON, whole or not at all.

        Raises:
            AssertionError: If two records have the same key.
        """
        path = Path(path)
        keys = [r.key for r in self.records]
        assert len(set(keys)) == len(keys), (
            f"duplicate records: {sorted(k for k in set(keys) if keys.count(k) > 1)[:3]}"
        )
        body = {"schema": SCHEMA, "provenance": self.provenance, "records": [asdict(r) for r in self.records]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Read a table written by ``write``.

        Raises:
            ConfigError: If the file is missing, not a table of records, or of a newer schema.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = body["schema"]
            if schema != SCHEMA:
                raise ConfigError(f"{path} has schema {cut(schema)}; this version reads {SCHEMA}")
            return cls(map(_record, body["records"]), {**body["provenance"]})
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}; expected a results.json written by a run"
            ) from error
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            AssertionError,
            OverflowError,
            RecursionError,
        ) as error:
            reason = f"missing key {error}" if isinstance(error, KeyError) else printable(str(error))
            raise ConfigError(f"{path} is not a results.json: {reason}") from error


def _record(body: dict[str, Any]) -> Record:
    """Make a record of what a file says.

    Raises:
        TypeError: If an attribute is of another type.
    """
    found = Record(**body)
    for names, kinds in _KINDS.items():
        for name in names.split():
            value = getattr(found, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{name} is {cut(value)}")
    if not all(isinstance(flag, str) for flag in found.flags):
        raise TypeError(f"flags are {cut(found.flags)}")
    return found


def handed_on(records: Iterable[Record]) -> list[Record]:
    """Return the layers that a scan hands to the questions after it, in order of depth.

    They are those that differ most, unless patching puts the layers in another order: then those where most
    of the effect enters.

    Args:
        records: The table of the scan.
    """
    chosen = [r for r in records if r.quantity == "chosen_layer"]
    disagree = any(DISAGREE in r.flags for r in chosen)
    wanted = ENTERS if disagree and any(r.params.get("by") == ENTERS for r in chosen) else PROPOSES
    return sorted((r for r in chosen if r.params.get("by") == wanted), key=lambda r: r.value or 0)


def is_own(record: Record) -> bool:
    """Whether a record is of a chosen handle as it is: not under a gate, and not fitted on one language."""
    return not {"gate", "fitted_on"} & record.params.keys()


def apart(one: Record, other: Record) -> bool | None:
    """Whether two intervals have nothing in common; None where an end is missing.

    Args:
        one: A number with its interval.
        other: Another one.
    """
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low > other.high or other.low > one.high
