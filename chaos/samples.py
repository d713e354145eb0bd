"""What may grow while a pod moves back and forth: counted from outside, all nodes at one time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.copies import cgroup_of, node_of
from lab.cluster import SYSTEM_NAMESPACE, Cluster

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_KINDS = {"operator": "python3 -m godwit_operator", "agent": "python3 -m godwit_agent"}
_NODE = """
count() { echo "$1 $(wc -l)"; }
ip route show table all | count routes
ip rule show | count rules
ip -o link | count links
nft list tables | count nft_tables
nft list ruleset | count nft_lines
count mounts < /proc/1/mountinfo
ls /run/netns | count netns
find /run/godwit -xdev | count godwit_files
ls /run/godwit/store | count stores
find /var/lib/godwit/journal -type f | count journals
ctr -n k8s.io images ls -q | count images
ctr -n k8s.io snapshots ls | count snapshots
ctr -n k8s.io containers ls -q | count containers
ls -d /proc/[0-9]* | count processes
grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | count zombies
"""
_OBJECTS = "endpointslices,secrets,configmaps,podmigrations,mutatingadmissionpolicies"


@dataclass(frozen=True, slots=True)
class Process:
    """One of ours at one moment. ``series``: the same for one life of a process."""

    kind: str
    node: str
    series: str
    rss_kib: int
    fds: int
    threads: int


def processes(testbed: str) -> list[Process]:
    """Operator and agents of a testbed, from the machine's process table."""
    return sorted(_find(testbed), key=lambda one: (one.kind, one.node))


def _find(testbed: str) -> Iterator[Process]:
    for directory in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            words = (directory / "cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
            kind = kind_of(words)
            freezer, unified = cgroup_of((directory / "cgroup").read_text()) if kind else ("", "")
            node = node_of(freezer or unified, testbed)
            if not kind or not node:
                continue
            status = fields((directory / "status").read_text())
            start = (directory / "stat").read_text().rpartition(")")[2].split()[19]
            yield Process(
                kind,
                node,
                f"{directory.name}@{start}",
                int(status["VmRSS"].split()[0]),
                sum(1 for _ in (directory / "fd").iterdir()),
                int(status["Threads"]),
            )


def kind_of(words: list[str]) -> str:
    """Which of ours a command line is; empty for any other."""
    line = " ".join([Path(words[0]).name, *words[1:]])
    return next((kind for kind, start in _KINDS.items() if line == start), "")


def fields(status: str) -> dict[str, str]:
    """``/proc/<pid>/status``."""
    return dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))


def counts(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(number) for name, number in (line.split() for line in text.splitlines())}


def cgroups(testbed: str, node: str) -> int:
    """Directories of a node in all of the machine's hierarchies."""
    found = 0
    for hierarchy in _CGROUPS.iterdir():
        top = hierarchy / f"godwit-testbed-{testbed}" / node
        if not hierarchy.is_symlink() and top.is_dir():
            found += sum(1 for _ in top.rglob("*/"))
    return found


def take(cluster: Cluster, nodes: list[str]) -> dict[str, object]:
    """One sample, JSON-ready."""
    per_node = {
        node: counts(cluster.node_exec(node, "sh", "-c", _NODE))
        | {"cgroups": cgroups(cluster.name, node)}
        for node in nodes
    }
    objects = cluster.kubectl("get", _OBJECTS, "-n", SYSTEM_NAMESPACE, "-o", "name").split()
    everywhere = cluster.kubectl("get", "endpointslices,pods", "-A", "-o", "name").split()
    return {
        "processes": [asdict(one) for one in processes(cluster.name)],
        "nodes": per_node,
        "api": {"system_objects": len(objects), "slices_and_pods": len(everywhere)},
    }
