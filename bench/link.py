"""The link between the nodes, as slow as a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lab.cluster import Cluster

# Every node's one interface to the others; see docs/testbed.md.
_DEVICE = "eth0"


@contextmanager
def limited(cluster: Cluster, nodes: list[str], mbit: int) -> Iterator[None]:
    """Each node sends at most ``mbit`` Mbit/s (0: no limit) for as long as the block runs."""
    if not mbit:
        yield
        return
    shape = ("rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
    try:
        for node in nodes:
            cluster.node_exec(node, "tc", "qdisc", "replace", "dev", _DEVICE, "root", "tbf", *shape)
        yield
    finally:
        for node in nodes:
            cluster.node_exec(node, "tc", "qdisc", "del", "dev", _DEVICE, "root", check=False)
