"""Many pods from one node to another at once."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from bench import place
from bench.cells import Cell
from bench.move import migrate
from bench.place import Place
from lab.cluster import Cluster

PODS = 10
CELL = Cell("redis", 128)
# Ten clients that ask every millisecond are most of a small machine's processors.
_INTERVAL_MS = 10.0


def measured(cluster: Cluster, nodes: list[str]) -> list[dict[str, Any]]:
    """One row per pod."""
    try:
        places = [place.start(cluster, CELL, nodes[0], f"bench{n}") for n in range(PODS)]
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(
                    cluster.counter(one.address, "count", "--interval-ms", str(_INTERVAL_MS))
                )
                for one in places
            ]
            time.sleep(2)
            ends: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
            threads = [threading.Thread(target=_one, args=(one, nodes[1], ends)) for one in places]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(2)
            reports = [client.stop() for client in clients]
    finally:
        place.clear(cluster)
    rows = []
    for one, client, report in zip(places, clients, reports, strict=True):
        status, seen = ends[one.pod]
        ticks = [tick for tick in client.ticks if tick["at"] >= seen["Applied"]]
        rows.append(
            {
                "outcome": status["phase"],
                "message": status.get("message"),
                "client_ok": report["ok"],
                "freeze_ms": status.get("freezeMilliseconds"),
                "gap_ms": max(tick["worst_ms"] for tick in ticks),
                "total_s": round(seen["End"] - seen["Applied"], 3),
                "timings_us": status.get("timings"),
            }
        )
    return rows


def _one(one: Place, target: str, ends: dict[str, tuple[dict[str, Any], dict[str, float]]]) -> None:
    ends[one.pod] = migrate(one, target)
