"""Any bytes and any JSON either load or are refused in one line; never another exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, right, written

SHORT, LONG = 40, 5000
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["../x", "/etc/passwd", "", "resid_post.1", "shard-00000.h5", "\x1b[2J", "\ud800", "1e999"]
    ),
)
JSON = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """Draw what a target accepts with one place changed: a value, a key, or for bytes some bytes."""
    body = right(name)
    if isinstance(body, bytes):
        start = draw(st.integers(0, len(body)))
        stop = min(start + draw(st.integers(0, 8)), len(body))
        return body[:start] + draw(st.binary(max_size=8)) + body[stop:]
    body = json.loads(json.dumps(body))
    node: Any = body
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        deeper = isinstance(node[key], dict | list) and len(node[key]) > 0
        if not deeper or draw(st.booleans()):
            break
        node = node[key]
    how = draw(st.sampled_from(["value", "value", "gone", "more"]))
    if how == "value":
        node[key] = draw(JSON)
    elif how == "gone":
        del node[key]
    elif isinstance(node, dict):
        node[draw(st.text(max_size=8))] = draw(JSON)
    else:
        node.append(draw(JSON))
    return written(name, body)


def anything(name: str) -> st.SearchStrategy[bytes]:
    """Draw bytes, JSON, or what is right but for one place."""
    return st.one_of(st.binary(max_size=200), JSON.map(lambda body: written(name, body)), changed(name))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_accepted(name: str) -> None:
    body = right(name)
    if name == "openings":
        rows = [body, body | {"kind": "comply"}] * 8
        assert TARGETS[name]("\n".join(map(json.dumps, rows)).encode())
    else:
        assert TARGETS[name](written(name, body))


@pytest.mark.parametrize("name", TARGETS)
def test_anything_loads_or_is_refused_in_one_line(name: str) -> None:
    @settings(max_examples=SHORT, derandomize=True, **QUIET)  # type: ignore[arg-type]
    @given(anything(name))
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_anything_at_length(name: str) -> None:
    @settings(max_examples=LONG, **QUIET)  # type: ignore[arg-type]
    @given(anything(name))
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()
