"""``make demo``: a Redis StatefulSet moves to another node and back under one TCP connection.

Exit status 0 only if every promise of the report holds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from lab import baseline, workloads
from lab.cluster import Cluster, Counter, say

NAMESPACE = "default"
NAME = "redis"
POD = "redis-0"


@dataclass(frozen=True)
class Move:
    """What one migration did, seen from outside and from its status."""

    source: str
    target: str
    freeze_ms: float
    gap_ms: float
    transferred_bytes: int
    same_name: bool
    same_address: bool


def show(seen: dict[str, Any], printed: set[str]) -> None:
    """Print each phase once, with what is known by then."""
    status = seen.get("status", {})
    phase = status.get("phase", "")
    if not phase or phase in printed:
        return
    printed.add(phase)
    details = [f"{status.get('sourceNode', '?')} → {status.get('targetNode', '?')}"]
    if status.get("transferredBytes"):
        details.append(f"{status['transferredBytes'] / 1e6:.0f} MB sent")
    if status.get("freezeMilliseconds"):
        details.append(f"freeze {status['freezeMilliseconds']} ms")
    if status.get("message"):
        details.append(status["message"])
    say(f"  {phase:<13}{', '.join(details)}")


def move(cluster: Cluster, client: Counter, name: str, target: str) -> Move:
    """Move the demo's pod to ``target`` and describe what happened."""
    before = cluster.get("pod", POD, NAMESPACE)
    seen_ticks = len(client.ticks)
    say(f"kubectl apply PodMigration {name}: {POD} to {target}")
    cluster.kubectl("delete", "podmigration", name, "-n", NAMESPACE, "--ignore-not-found")
    cluster.apply(workloads.migration(name, NAMESPACE, POD, target))
    printed: set[str] = set()
    final = cluster.watch_migration(name, NAMESPACE, seen=lambda item: show(item, printed))
    status = final["status"]
    if status["phase"] != "Succeeded":
        raise SystemExit(f"the migration ended {status['phase']}: {status.get('message')}")
    cluster.wait_ready(POD, NAMESPACE)
    after = cluster.get("pod", POD, NAMESPACE)
    return Move(
        source=before["spec"]["nodeName"],
        target=after["spec"]["nodeName"],
        freeze_ms=float(status["freezeMilliseconds"]),
        gap_ms=max((tick["worst_ms"] for tick in client.ticks[seen_ticks:]), default=0.0),
        transferred_bytes=int(status["transferredBytes"]),
        same_name=before["metadata"]["name"] == after["metadata"]["name"],
        same_address=before["status"]["podIP"] == after["status"]["podIP"],
    )


def report(moves: list[Move], client: dict[str, Any], stock_ms: float | None) -> bool:
    """Print the closing report; True if every promise holds."""
    good = client["ok"] and all(
        item.same_name and item.same_address and item.source != item.target for item in moves
    )
    print()
    print(f"  connection   {'the same all the time' if client['ok'] else client['error']}")
    print(f"  counter      {client['count']} increments, {'exact' if client['ok'] else 'WRONG'}")
    for item in moves:
        print(
            f"  {item.source} → {item.target}      freeze {item.freeze_ms:.0f} ms, "
            f"client gap {item.gap_ms:.0f} ms, {item.transferred_bytes / 1e6:.0f} MB sent, "
            f"name {'kept' if item.same_name else 'CHANGED'}, "
            f"IP {'kept' if item.same_address else 'CHANGED'}"
        )
    if stock_ms is not None:
        worst = max(item.gap_ms for item in moves)
        print(
            f"  stock CRIU   {stock_ms:.0f} ms for dump with lazy pages and restore of the same "
            f"container by hand on one node; worst gap above is {worst / stock_ms:.2f} × that"
        )
    print(f"\n  {'Godwit moved the pod there and back.' if good else 'NOT as promised.'}")
    return good


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="data in Redis (MiB)")
    parser.add_argument("--moves", type=int, default=2, help="moves, there and back in turn")
    parser.add_argument("--no-stock", action="store_true", help="skip the stock CRIU comparison")
    options = parser.parse_args()
    cluster = Cluster()
    say("testbed up (the first time it builds Kubernetes: about ten minutes)")
    cluster.up()
    cluster.build_images()
    cluster.install()
    nodes = cluster.ready_nodes()
    say(f"StatefulSet {NAME} on {nodes[0]}, filled with {options.megabytes} MiB")
    cluster.kubectl("delete", "statefulset", NAME, "--ignore-not-found", "--cascade=foreground")
    cluster.apply(
        workloads.service(NAME, NAMESPACE),
        workloads.stateful_set(NAME, NAMESPACE, node=nodes[0]),
    )
    cluster.wait_ready(POD, NAMESPACE)
    pod = cluster.get("pod", POD, NAMESPACE)
    address, here = pod["status"]["podIP"], pod["spec"]["nodeName"]
    cluster.fill(address, options.megabytes)
    stock = None if options.no_stock else baseline.stock_criu(cluster, POD, NAMESPACE)
    moves = []
    with cluster.counter(address, "count", "--interval-ms", "1") as client:
        say(f"client outside the cluster counts on one connection to {address}")
        for number in range(options.moves):
            there = next(node for node in nodes if node != here)
            moves.append(move(cluster, client, f"demo-{number + 1}", there))
            here = there
        last = client.stop()
    return 0 if report(moves, last, stock) else 1


if __name__ == "__main__":
    sys.exit(main())
