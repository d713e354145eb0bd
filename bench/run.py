"""``make bench``: real migrations on the testbed, every single one a line of JSON.

Appends to ``bench/results/runs.jsonl``: one object with ``"kind": "run"`` (machine, versions),
then ``move``, ``together`` and ``aside`` objects that name the run. ``python -m bench.report``
makes docs/performance.md of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import aside, cells, place, together
from bench.agents import AgentMemory
from bench.cells import Cell
from bench.link import limited
from bench.move import measured
from lab.cluster import ROOT, Cluster, say

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
# Cells whose pod is also moved by other means, and those whose agents are watched.
BESIDE = (cells.MAIN.name, cells.DEMO.name, cells.LARGE.name)
WATCHED = (cells.LARGE.name, "dirtier-4096M")


class Log:
    """Rows of one run, written as they come."""

    def __init__(self, path: Path, at: str) -> None:
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("a")
        self._at = at

    def row(self, kind: str, **fields: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"kind": kind, "run": self._at, **fields}) + "\n")
        self._file.flush()


def machine(cluster: Cluster) -> dict[str, Any]:
    """What a timing depends on."""
    versions = cluster.node_exec(
        *("n1", "sh", "-c"), "containerd --version; runc --version; /opt/godwit/criu/criu --version"
    )
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    server = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "commit": commit.stdout.strip(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "model": model[1] if model else platform.machine(),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "kubernetes": server,
        "versions": [line for line in versions.splitlines() if "version" in line.lower()],
    }


def run_cell(cluster: Cluster, nodes: list[str], cell: Cell, log: Log, *, beside: bool) -> None:
    """All moves of one cell, there and back, under one connection."""
    say(f"{cell.name}: {cell.moves} moves")
    spec: dict[str, Any] = {"timeouts": {"copySeconds": 900}}
    if cell.budget_ms:
        spec["freezeBudgetMilliseconds"] = cell.budget_ms
    if cell.post_copy:
        spec["convergence"] = "PostCopy"
    if cell.limit:
        spec["bandwidthLimit"] = cell.limit
    with place.running(cluster, cell, nodes[0]) as here:
        if beside and cell.name in BESIDE:
            for row in aside.by_hand(here):
                log.row("aside", **cell.to_json(), **row)
        counting = ("count", "--interval-ms", str(cell.interval_ms))
        with (
            limited(cluster, nodes, cell.link_mbit),
            cluster.counter(here.address, *counting) as client,
        ):
            for number in range(cell.moves):
                target = next(node for node in nodes if node != here.node)
                with AgentMemory(cluster, nodes if cell.name in WATCHED else []) as agents:
                    row = measured(here, client, target, **spec)
                log.row("move", **cell.to_json(), number=number, **row, agents=agents.to_json())
                say(f"  {_short(row)}")
            report = client.stop()
        log.row("client", **cell.to_json(), ok=report["ok"], error=report["error"],
                replies=report["count"])  # fmt: skip
        if not report["ok"]:
            say(f"  THE CLIENT: {report['error']}")
        if beside and cell == cells.MAIN:
            log.row("aside", **cell.to_json(), **aside.rescheduled(here))


def run_together(cluster: Cluster, nodes: list[str], log: Log) -> None:
    """Many pods at once."""
    say(f"{together.PODS} pods of {together.CELL.megabytes} MiB at once")
    for row in together.measured(cluster, nodes):
        log.row("together", **together.CELL.to_json(), pods=together.PODS, **row)
        say(f"  {row['outcome']}: freeze {row['freeze_ms']}, gap {row['gap_ms']} ms")


def _short(row: dict[str, Any]) -> str:
    wrong = "" if row["wrong_pages"] is None else f", {row['wrong_pages']} wrong pages"
    return (
        f"{row['outcome']}: freeze {row.get('freeze_ms')} ms, gap {row['gap_ms']} ms, "
        f"total {row['total_s']} s{wrong}"
    )


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Cells of the command line."""
    grid = cells.quick() if options.quick else cells.full()
    return [cell for cell in grid if re.search(options.only, cell.name)]


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of an hour")
    parser.add_argument("--only", default="", help="regular expression over the cells' names")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--no-together", action="store_true", help="not many pods at once")
    parser.add_argument("--no-beside", action="store_true", help="not by other means")
    parser.add_argument("--as-is", action="store_true", help="a standing testbed as it is")
    options = parser.parse_args()
    if options.list:
        for cell in chosen(options):
            print(f"{cell.name}  ({cell.moves} moves)")
        return 0
    cluster = Cluster()
    if not options.as_is:
        cluster.up()
        cluster.build_images()
        cluster.install()
    nodes = cluster.ready_nodes()
    cluster.empty_namespace(place.NAMESPACE)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    log = Log(RESULTS, at)
    log.row("run", **machine(cluster))
    for cell in chosen(options):
        run_cell(cluster, nodes[:2], cell, log, beside=not options.no_beside)
    if not options.no_together:
        run_together(cluster, nodes[:2], log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
