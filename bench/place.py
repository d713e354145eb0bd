"""Workloads of the benchmark on the cluster: started, moved, checked, removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.cells import Cell
from lab import workloads
from lab.cluster import Cluster, CommandFailed

NAMESPACE = "bench"


@dataclass
class Place:
    """A pod that is measured, and where it is now."""

    cluster: Cluster
    pod: str
    address: str
    node: str
    workload: str

    def wrong_pages(self) -> int | None:
        """How many pages do not hold what was last written to them; None for Redis."""
        if self.workload == "redis":
            return None
        return self.cluster.number(self.address, "VERIFY")


def start(cluster: Cluster, cell: Cell, node: str, name: str = "bench") -> Place:
    """The cell's workload, filled, and writing at its rate."""
    redis = cell.workload == "redis"
    pod = f"{name}-0" if redis else name
    if redis:
        cluster.apply(
            workloads.service(name, NAMESPACE),
            workloads.stateful_set(name, NAMESPACE, node=node),
        )
    else:
        image, shared = cluster.workload_image("dirtier"), cell.workload == "shared"
        cluster.apply(
            workloads.dirtier(name, NAMESPACE, image, cell.megabytes, node=node, shared=shared)
        )
    cluster.wait_ready(pod, NAMESPACE)
    found = cluster.get("pod", pod, NAMESPACE)
    address = found["status"]["podIP"]
    if redis:
        cluster.fill(address, cell.megabytes)
    elif "OK" not in cluster.redis(address, "RATE", str(cell.dirty_rate)):
        raise CommandFailed(f"{pod} does not take its rate")
    return Place(cluster, pod, address, found["spec"]["nodeName"], cell.workload)


@contextmanager
def running(cluster: Cluster, cell: Cell, node: str) -> Iterator[Place]:
    """The cell's workload for as long as the block runs."""
    try:
        yield start(cluster, cell, node)
    finally:
        clear(cluster)


def clear(cluster: Cluster) -> None:
    """No workload, no migration."""
    kinds = "statefulsets,services,pods,podmigrations"
    cluster.kubectl(
        "delete", kinds, "--all", "-n", NAMESPACE, "--cascade=foreground", "--timeout=120s"
    )
