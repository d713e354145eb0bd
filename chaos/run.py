"""``make chaos``: every row of the matrix once, results as JSON lines.

Each row appends one object to ``chaos/results/rows.jsonl``; ``python -m chaos.report`` makes
the table of docs/reliability.md. Exit status 1 if any invariant was violated.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chaos import rows as matrix
from chaos import stage
from chaos.commit import commit
from chaos.copies import Copies
from chaos.faults import FAULTS
from chaos.rows import Row
from chaos.stage import NAMESPACE, POD, Stage
from lab import workloads
from lab.cluster import SYSTEM_NAMESPACE, Cluster, CommandFailed, Counter, say
from lab.debris import wait_clean

RESULTS = Path(__file__).parent / "results" / "rows.jsonl"
_END_S = 180.0
_CLEAN_S = 90.0
_NUMBERS = itertools.count(1)


def prepare(cluster: Cluster) -> list[str]:
    """Godwit with failpoints, an empty namespace; the nodes."""
    cluster.install("failpoints=true")
    cluster.empty_namespace(NAMESPACE)
    return cluster.ready_nodes()


def fresh(cluster: Cluster) -> None:
    """New pods of operator and agents: the kubelet lets one that was killed wait, ten seconds
    the second time, twice as long each time after."""
    cluster.kubectl("delete", "pods", "--all", "-n", SYSTEM_NAMESPACE, "--timeout=120s")
    for kind in ("deployment/godwit-operator", "daemonset/godwit-node-agent"):
        cluster.kubectl("rollout", "status", kind, "-n", SYSTEM_NAMESPACE, "--timeout=120s")


def attempt(cluster: Cluster, nodes: list[str], row: Row) -> dict[str, Any]:
    """A row's result, also when it does not come to its end: then that is the violation."""
    try:
        return run_row(cluster, nodes, row)
    except (CommandFailed, AssertionError, ValueError, KeyError) as error:
        cluster.empty_namespace(NAMESPACE)
        return {
            "row": row.name,
            "boundary": row.boundary.name,
            "fault": row.fault,
            "phase": "Lost",
            "reason": None,
            "connection": False,
            "gap_ms": 0.0,
            "violations": [f"it came to no end: {error}"],
        }


def run_row(cluster: Cluster, nodes: list[str], row: Row) -> dict[str, Any]:
    """One migration with its fault, the checks, and the next migration."""
    number = f"{int(time.time())}-{next(_NUMBERS)}"
    cluster.kubectl("delete", "podmigrations", "--all", "-n", NAMESPACE, "--timeout=60s")
    here = cluster.list("pods", NAMESPACE, "-l", "app=redis")
    if not here:
        stage.start(cluster, nodes[0])
    cluster.wait_ready(POD, NAMESPACE)
    scene = _scene(cluster, nodes, f"m{number}", row)
    gone = _gone(scene, row)
    if gone and gone == _home(scene.pod()):
        _next(scene, nodes, f"h{number}")
        scene = _scene(cluster, nodes, f"m{number}", row)
        gone = _gone(scene, row)
    source, target, address = scene.source, scene.target, scene.address
    if gone:
        scene.operator_away_from(gone)
    begin = time.monotonic()
    result: dict[str, Any] = {"row": row.name, "boundary": row.boundary.name, "fault": row.fault}
    with (
        Copies(cluster.name, "redis-server") as copies,
        cluster.counter(address, "count", "--timeout", "400") as client,
    ):
        scene.pause(row.boundary)
        try:
            scene.apply()
            result["reached"] = scene.await_pause(row.boundary)
            with FAULTS[row.fault](scene):
                scene.go(row.boundary)
        finally:
            scene.go(row.boundary)
        result["struck"] = scene.struck
        final = scene.final(_END_S)
        scene.clear(row.boundary)
        scene.pod()
        result |= {
            "phase": final.get("phase"),
            "reason": final.get("reason"),
            "message": final.get("message"),
            "freeze_ms": final.get("freezeMilliseconds"),
            "seconds": round(time.monotonic() - begin, 1),
        }
        report = _report(client)
    result |= {
        "connection": report["ok"],
        "client_error": report["error"],
        "gap_ms": report["worst_ms"],
        "replies": report["count"],
        "ran_on": copies.history(),
        "samples": len(copies.seen),
        "copies": copies.doubles[-4:],
        "observer": copies.blind(source),
        "node_after": cluster.get("pod", POD, NAMESPACE)["spec"]["nodeName"],
        "debris": wait_clean(cluster, nodes, _CLEAN_S, pod_lives=True),
        "next": _next(scene, nodes, f"n{number}"),
    }
    result["violations"] = violations(row, result, source, target)
    return result


def _scene(cluster: Cluster, nodes: list[str], name: str, row: Row) -> Stage:
    """From where the pod is now to the other node."""
    pod = cluster.get("pod", POD, NAMESPACE)
    source = pod["spec"]["nodeName"]
    target = next(node for node in nodes if node != source)
    return Stage(cluster, source, target, pod["status"]["podIP"], name, row.boundary.name)


def _gone(scene: Stage, row: Row) -> str | None:
    """The node that the fault takes away."""
    nodes = {"source node gone": scene.source, "target node gone": scene.target}
    return nodes.get(row.fault)


def _home(pod: dict[str, Any]) -> str:
    """The node whose range the pod's address is of: without it no packet from outside the cluster
    finds its way, wherever the pod is."""
    annotations = pod["metadata"].get("annotations", {})
    return str(annotations.get("godwit.io/home-node", pod["spec"]["nodeName"]))


def _report(client: Counter) -> dict[str, Any]:
    """What the client has seen; it may have ended by itself."""
    try:
        return client.report or client.stop()
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": "it still waits for an answer", "worst_ms": 0.0, "count": 0}


def _next(scene: Stage, nodes: list[str], name: str) -> str:
    """Phase of one more migration without a fault."""
    here = scene.pod()["spec"]["nodeName"]
    target = next(node for node in nodes if node != here)
    scene.cluster.apply(workloads.migration(name, NAMESPACE, POD, target))
    status = scene.cluster.watch_migration(name, NAMESPACE)["status"]
    return str(status["phase"])


def violations(row: Row, seen: dict[str, Any], source: str, target: str) -> list[str]:
    """What must hold and does not."""
    allowed = row.allowed | ({"Deleted"} if row.fault == "delete the migration" else frozenset())
    wrong = []
    if not seen["reached"]:
        wrong.append("the boundary was not reached")
    if not seen["struck"]:
        wrong.append("the fault has not struck")
    if seen["phase"] not in allowed:
        wrong.append(f"ended {seen['phase']}")
    elif seen["phase"] == "Aborted" and seen["reason"] not in row.reasons:
        wrong.append(f"the reason {seen['reason']} is none of this fault")
    if seen["observer"]:
        wrong.append(f"the observer: {seen['observer']}")
    if any("+" in where for where in seen["ran_on"]):
        wrong.append("two copies ran")
    if row.connection and not seen["connection"]:
        wrong.append(f"the client: {seen['client_error']}")
    expected = {"Succeeded": {target}, "Aborted": {source}}.get(seen["phase"])
    if row.connection and expected and seen["node_after"] not in expected:
        wrong.append(f"the pod is on {seen['node_after']}")
    if seen["debris"]:
        wrong.append("debris")
    if seen["next"] != "Succeeded":
        wrong.append(f"the next migration: {seen['next']}")
    return wrong


def chosen(options: argparse.Namespace, done: frozenset[str] = frozenset()) -> list[Row]:
    """Rows of the command line, in an order that is the same every time and looks random: when
    the time ends, what was run is a fair part of the whole."""
    rows = [
        row
        for row in matrix.rows()
        if re.search(options.only, row.name)
        and (not options.sample or row.name in matrix.SAMPLE)
        and row.name not in done
    ]
    return sorted(rows, key=lambda row: hashlib.sha256(row.name.encode()).digest())


def already() -> frozenset[str]:
    """Rows with a result."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return frozenset(json.loads(line)["row"] for line in lines)


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression over boundary/fault")
    parser.add_argument("--sample", action="store_true", help="a few rows that find the most")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--minutes", type=float, default=240.0, help="begin no row after that")
    parser.add_argument("--missing", action="store_true", help="only rows without a result")
    parser.add_argument("--as-is", action="store_true", help="a standing testbed and its images")
    options = parser.parse_args()
    rows = chosen(options, already() if options.missing else frozenset())
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    cluster = Cluster()
    if not options.as_is:
        cluster.up()
        cluster.build_images()
    nodes = prepare(cluster)[:2]
    begin, bad = time.monotonic(), 0
    RESULTS.parent.mkdir(exist_ok=True)
    for row in rows:
        if time.monotonic() - begin > options.minutes * 60:
            break
        result = attempt(cluster, nodes, row)
        bad += bool(result["violations"])
        about = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "kernel": platform.release(),
            "commit": commit(),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(about | result) + "\n")
        held = ", ".join(result["violations"]) or "all holds"
        say(f"{row.name}: {result['phase']}, gap {result['gap_ms']:.0f} ms; {held}")
        if row.fault.startswith("kill"):
            fresh(cluster)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
