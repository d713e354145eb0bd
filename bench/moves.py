"""``make bench-moves``: many moves of the demo's Redis, beside stock CRIU by hand in the same run.

One JSON object per move is appended to ``bench/results/moves.jsonl`` (all
timings of the switch in microseconds, the client's largest gap in
milliseconds), one with ``"kind": "run"`` per run; the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lab import baseline, workloads
from lab.cluster import Cluster, Counter, say

RESULTS = Path(__file__).parent / "results" / "moves.jsonl"
POD = "redis-0"


def one_move(cluster: Cluster, client: Counter, number: int, target: str) -> dict[str, Any]:
    """Move the pod and return what was measured from outside and inside."""
    name = f"bench-{number}"
    cluster.kubectl("delete", "podmigration", name, "--ignore-not-found")
    seen = len(client.ticks)
    cluster.apply(workloads.migration(name, "default", POD, target))
    status = cluster.watch_migration(name, "default")["status"]
    if status["phase"] != "Succeeded":
        raise SystemExit(f"{name} ended {status['phase']}: {status.get('message')}")
    cluster.wait_ready(POD, "default")
    phases = status["phaseTransitionTimestamps"]
    return {
        "kind": "move",
        "number": number,
        "target": target,
        "freeze_ms": status["freezeMilliseconds"],
        "gap_ms": max(tick["worst_ms"] for tick in client.ticks[seen:]),
        "transferred_bytes": status["transferredBytes"],
        "rounds": status.get("rounds"),
        "timings_us": status.get("timings"),
        "phases": {item["phase"]: item["timestamp"] for item in phases},
    }


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=200)
    options = parser.parse_args()
    cluster = Cluster()
    cluster.up()
    cluster.build_images()
    cluster.install()
    nodes = [item["metadata"]["name"] for item in cluster.list("nodes", "default")]
    cluster.kubectl("delete", "statefulset", "redis", "--ignore-not-found", "--cascade=foreground")
    cluster.apply(
        workloads.service("redis", "default"),
        workloads.stateful_set("redis", "default", node=nodes[0]),
    )
    cluster.wait_ready(POD, "default")
    pod = cluster.get("pod", POD, "default")
    address, here = pod["status"]["podIP"], pod["spec"]["nodeName"]
    cluster.fill(address, options.megabytes)
    stock = baseline.stock_criu(cluster, POD, "default")
    run = {
        "kind": "run",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "megabytes": options.megabytes,
        "stock_criu_ms": round(stock, 1),
    }
    rows = []
    with cluster.counter(address) as client:
        for number in range(1, options.moves + 1):
            here = next(node for node in nodes if node != here)
            rows.append(one_move(cluster, client, number, here))
            row = rows[-1]
            say(f"  move {number}: freeze {row['freeze_ms']:.0f} ms, gap {row['gap_ms']:.0f} ms")
        report = client.stop()
    if not report["ok"]:
        raise SystemExit(f"the client's connection did not live: {report['error']}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for item in (run, *rows):
            file.write(json.dumps(item) + "\n")
    gap = statistics.median(row["gap_ms"] for row in rows)
    freeze = statistics.median(row["freeze_ms"] for row in rows)
    print(f"moves                {len(rows)} of {options.megabytes} MiB, one connection")
    print(f"client gap, median   {gap:.0f} ms (largest {max(r['gap_ms'] for r in rows):.0f})")
    print(f"freeze, median       {freeze:.0f} ms")
    print(f"stock CRIU by hand   {stock:.0f} ms; gap / stock = {gap / stock:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
