"""One migration, measured from inside (its status) and from outside (its client)."""

from __future__ import annotations

import itertools
import time
from typing import Any

from bench.place import NAMESPACE, Place
from lab import workloads
from lab.cluster import Counter

_NUMBERS = itertools.count(1)
_BEFORE_S = 2.0


def migrate(place: Place, target: str, **spec: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Final status, and when (Unix seconds) each phase was seen first."""
    seen: dict[str, float] = {"Applied": time.time()}

    def look(item: dict[str, Any]) -> None:
        phase = item.get("status", {}).get("phase")
        if phase:
            seen.setdefault(phase, time.time())

    name = f"bench-{next(_NUMBERS)}"
    place.cluster.apply(workloads.migration(name, NAMESPACE, place.pod, target, **spec))
    final = place.cluster.watch_migration(name, NAMESPACE, seconds=900, seen=look)
    seen["End"] = time.time()
    return final["status"], seen


def measured(place: Place, client: Counter, target: str, **spec: Any) -> dict[str, Any]:
    """Move the pod; one row of results, without the cell's columns.

    Times in milliseconds where the name says so, ``timings_us`` in microseconds, ``total_s``
    from ``kubectl apply`` to the final phase as a watch sees them; ``phases_s`` and ``gap_at_s``
    since then, the latter up to a tick (0.2 s) after the longest gap.
    """
    time.sleep(_BEFORE_S)  # what the client gets undisturbed is measured too
    status, seen = migrate(place, target, **spec)
    moved = status["phase"] == "Succeeded"
    row: dict[str, Any] = {
        "outcome": status["phase"] if moved else f"{status['phase']}: {status.get('reason')}",
        "message": status.get("message"),
        "total_s": round(seen["End"] - seen["Applied"], 3),
        "predicted_freeze_ms": status.get("predictedFreezeMilliseconds"),
        "transferred_bytes": status.get("transferredBytes"),
        "post_copy_bytes": status.get("postCopyBytes", 0),
        "rounds": status.get("rounds"),
        "dirty_bytes_s": status.get("dirtyBytesPerSecond"),
        "bandwidth_bytes_s": status.get("bandwidthBytesPerSecond"),
        "phases_s": {key: round(at - seen["Applied"], 3) for key, at in seen.items()},
    }
    if moved:
        place.cluster.wait_ready(place.pod, NAMESPACE)
        place.node = target
        row["freeze_ms"] = status["freezeMilliseconds"]
        row["timings_us"] = status.get("timings")
    time.sleep(_BEFORE_S)
    ticks = [tick for tick in client.ticks if tick["at"] >= seen["Applied"]]
    longest = max(ticks, key=lambda tick: float(tick["worst_ms"]))
    row["gap_ms"] = longest["worst_ms"]
    row["gap_at_s"] = round(longest["at"] - seen["Applied"], 3)
    switched = seen.get("Switching", seen["End"])
    row["requests_per_s"] = {
        "before": rate(client.ticks, seen["Applied"] - _BEFORE_S, seen["Applied"]),
        "copying": rate(client.ticks, seen.get("Copying", switched), switched),
        "after": rate(client.ticks, seen["End"], time.time()),
    }
    row["wrong_pages"] = place.wrong_pages()
    return row


def rate(ticks: list[dict[str, Any]], begin: float, end: float) -> float | None:
    """Replies per second between two times (Unix seconds); None without two ticks there."""
    within = [tick for tick in ticks if begin <= tick["at"] <= end]
    if len(within) < 2:
        return None
    first, last = within[0], within[-1]
    seconds = last["at"] - first["at"]
    return round((last["count"] - first["count"]) / seconds, 1) if seconds > 0 else None
