"""The table that every run writes."""

import json
import re
from pathlib import Path

import pytest

from mechdiff.errors import ConfigError
from mechdiff.results import CONTROLS, QUANTITIES, Record, Results

BASE = {"question": "rq2", "quantity": "r2", "value": 0.5, "n": 10, "unit": "fraction"}
MISSING = {"value": None, "reason": "gap_too_small"}


def make(**more) -> Record:
    return Record(**(BASE | more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantity": "r3"}, "r3 is not a quantity of rq2"),
        ({"quantity": "churn"}, "churn is not a quantity of rq2"),
        ({"control": "nothing"}, "nothing is not a control"),
        ({"value": None}, "r2: a missing value needs a reason, and only that"),
        ({"reason": "gap_too_small"}, "r2: a missing value needs a reason, and only that"),
        ({"value": float("nan"), "site": "resid_post.3"}, "r2 at resid_post.3 is nan"),
        ({"value": float("inf")}, "r2 at None is inf"),
        ({"low": float("-inf")}, "r2 at None is -inf"),
        ({"high": float("nan")}, "r2 at None is nan"),
    ],
)
def test_a_record_refuses_what_would_mislead(more: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}"):
        make(**more)


@pytest.mark.parametrize(
    "more", [{}, MISSING, {"low": 0.4, "high": 0.6}, {"control": "identity"}, {"params": {"k": 2}}]
)
def test_a_record_survives_the_file(more: dict, tmp_path: Path) -> None:
    record = make(**more, flags=("lambda_at_edge",), rows=731)
    results = Results([record], {"pair": {"name": "ұлттық"}, "seed": 17})
    again = Results.read(results.write(tmp_path / "new" / "results.json"))
    assert again.records == [record]
    assert again.provenance == results.provenance
    assert isinstance(again.records[0].flags, tuple)


def test_writing_twice_gives_the_same_bytes_and_leaves_no_part(tmp_path: Path) -> None:
    results = Results([make(), make(control="shuffled")], {"seed": 17})
    path = tmp_path / "results.json"
    first = results.write(path).read_bytes()
    assert Results.read(path).write(path).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(first)["schema"] == 1


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({"value": 0.7, "n": 3, "unit": "nats", "flags": ("x",), "rows": 2, "low": 0.1}, True),
        ({"site": "resid_post.1"}, False),
        ({"positions": "last"}, False),
        ({"split": "dev"}, False),
        ({"control": "identity"}, False),
        ({"model": "tuned"}, False),
        ({"params": {"k": 1}}, False),
    ],
)
def test_what_identifies_a_record(more: dict, same: bool, tmp_path: Path) -> None:
    results = Results([make(), make(**more)])
    if same:
        with pytest.raises(AssertionError, match=r"^duplicate records: "):
            results.write(tmp_path / "results.json")
        assert not list(tmp_path.iterdir())
    else:
        assert len(Results.read(results.write(tmp_path / "results.json"))) == 2


def test_the_order_of_params_does_not_identify() -> None:
    assert make(params={"k": 1, "alpha": 2.0}).key == make(params={"alpha": 2.0, "k": 1}).key


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ({}, 3),
        ({"site": "resid_post.1"}, 2),
        ({"site": "resid_post.1", "control": "none"}, 1),
        ({"k": 2}, 1),
        ({"k": 3}, 0),
        ({"quantity": "cka"}, 0),
        ({"positions": None}, 3),
    ],
)
def test_select(where: dict, count: int) -> None:
    results = Results(
        [
            make(site="resid_post.1"),
            make(site="resid_post.1", control="identity"),
            make(site="resid_post.2", params={"k": 2}),
        ]
    )
    assert len(results.select(**where)) == count
    assert len(results) == len(list(results)) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "cannot read {path}: No such file or directory; expected a results.json written by a run"),
        ("{", "{path} is not a results.json: Expecting property name"),
        ("[]", "{path} is not a results.json: list indices must be"),
        ("{}", "{path} is not a results.json: missing key 'schema'"),
        ('{"schema": 2}', "{path} has schema 2; this version reads 1"),
        ('{"schema": 1}', "{path} is not a results.json: "),
        ('{"schema": 1, "provenance": {}, "records": [{"colour": 1}]}', "{path} is not a results.json: "),
    ],
)
def test_a_file_that_is_no_table_is_one_line(body: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if body is not None:
        path.write_text(body)
    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(path=path))}") as caught:
        Results.read(path)
    assert "\n" not in str(caught.value)


def test_every_question_has_quantities_and_every_name_is_one_word() -> None:
    names = [name for names in QUANTITIES.values() for name in names] + list(CONTROLS)
    assert QUANTITIES.keys() == {"rq1", "rq2", "rq3", "rq4"}
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
