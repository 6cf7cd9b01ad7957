"""Run several ways of doing one thing in turn on the CPU, and compare what they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """What one call took: seconds by the clock, and seconds of all processors together."""

    seconds: float
    cpu: float


def turn(call: Callable[[], Any]) -> Turn:
    """Time one call on the CPU."""
    begun, used = time.perf_counter(), time.process_time()
    call()
    return Turn(time.perf_counter() - begun, time.process_time() - used)


def in_turn(
    ways: Mapping[str, Callable[[], Turn]], rounds: int, fewer: Mapping[str, int] | None = None
) -> dict[str, list[Turn]]:
    """Run several ways of doing one thing in turn, so that what slows the machine slows them all.

    Args:
        ways: Each runs once and says what it took.
        rounds: How often; in every other round the order is reversed.
        fewer: Rounds of the ways that are run less often, from the first on.
    """
    found: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(rounds):
        names = [name for name in ways if number < (fewer or {}).get(name, rounds)]
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(ways[name]())
    return found


def median(turns: Sequence[Turn]) -> float:
    """Return the median of the seconds."""
    return statistics.median(one.seconds for one in turns)


def ratio(
    over: Sequence[Turn], under: Sequence[Turn], goal: float | None = None, scale: float = 1.0, **more: Any
) -> dict[str, Any]:
    """Divide what one way took by what the other took, round by round.

    Args:
        over: The one.
        under: The other; rounds that only one of them has do not count.
        goal: What the ratio should be.
        scale: What the first is multiplied by, where it did a part of the work.
        **more: What else is to be said, such as ``at_most``.
    """
    pairs = list(zip(over, under, strict=False))
    clock = [scale * a.seconds / b.seconds for a, b in pairs]
    used = [scale * a.cpu / b.cpu for a, b in pairs if b.cpu]
    about = {"low": min(clock), "high": max(clock), "rounds": len(pairs)}
    about["of_processor_time"] = statistics.median(used) if used else None
    return {"value": statistics.median(clock), "goal": goal, **about, **more}
