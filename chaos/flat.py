"""Whether something has grown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

WARM_UP = 5
"""Samples of a series that do not count: a process that has just begun takes what it needs."""
MEMORY_WARM_UP = 0.5
"""Share of a series of memory that does not count: a heap fills its gaps for half an hour before
it stays what it is. A leak goes on in the second half of a process' life, a warm-up does not."""
FEWEST = 10
"""Samples behind the warm-up that a series must have to be judged."""
KEPT = frozenset({"journals"})
"""Grows on purpose: journals are kept for three days, so that repeated questions get answers."""
SHARE, RSS_KIB, COUNT = 0.05, 2048.0, 3.0
Series = dict[tuple[str, ...], list[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``growth``: of a straight line through the samples, from the first to the last of them."""

    name: tuple[str, ...]
    samples: int
    median: float
    growth: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.growth <= self.allowed


def judge(name: tuple[str, ...], points: Sequence[tuple[float, float]]) -> Verdict | None:
    """Theil-Sen: the median slope of all pairs, which single outliers do not move.

    None for a series that is too short to say anything. Allowed is a twentieth of the median,
    and at least 2 MiB of memory or 3 of anything that is counted.
    """
    memory = name[-1] == "rss_kib"
    points = points[max(WARM_UP, int(MEMORY_WARM_UP * len(points)) if memory else 0) :]
    if len(points) < FEWEST:
        return None
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]
    growth = statistics.median(slopes) * (points[-1][0] - points[0][0])
    middle = statistics.median(value for _, value in points)
    least = RSS_KIB if memory else COUNT
    return Verdict(name, len(points), middle, growth, max(SHARE * middle, least))


def series(minutes: Iterable[dict[str, Any]]) -> Series:
    """(minute, value) of everything that was sampled, a process anew after each restart."""
    found: Series = {}
    for minute in minutes:
        sample, at = minute.get("sample"), float(minute["minute"])
        if not sample:
            continue
        for one in sample["processes"]:
            for what in ("rss_kib", "fds", "threads"):
                name = (one["kind"], one["node"], one["series"], what)
                found.setdefault(name, []).append((at, float(one[what])))
        places = {**sample["nodes"], "API": sample["api"]}
        for node, values in places.items():
            for what, value in values.items():
                found.setdefault((node, what), []).append((at, float(value)))
    return found


def verdicts(minutes: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Of every series that is long enough."""
    found = series(minutes).items()
    judged = (judge(name, points) for name, points in found if name[-1] not in KEPT)
    return [verdict for verdict in judged if verdict]
