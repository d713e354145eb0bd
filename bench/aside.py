"""What else can be done with the same pod on the same machine: the figures beside ours."""

from __future__ import annotations

import time
from typing import Any

from bench.place import NAMESPACE, Place
from lab import baseline, podman
from lab.cluster import CommandFailed

_ROUNDS = 5
# Its archive and the copy of it lie in memory too: about a GiB with so many keys.
_PODMAN_KEYS = 1_000_000


def by_hand(place: Place) -> list[dict[str, Any]]:
    """The tools underneath, without Kubernetes, for the same container on one node."""
    rows = []
    for what, lazy in (("runc and CRIU, lazy pages", True), ("runc and CRIU, whole image", False)):
        times = baseline.by_hand(place.cluster, place.pod, NAMESPACE, rounds=_ROUNDS, lazy=lazy)
        rows.append({"what": what, "rounds_ms": [round(one, 1) for one in times]})
    keys = place.cluster.number(place.address, "DBSIZE")
    if keys <= _PODMAN_KEYS:
        found = podman.moves(place.cluster, keys, _ROUNDS)
        times = [(one["checkpoint"] + one["copy"] + one["restore"]) / 1e6 for one in found]
        rows.append(
            {
                "what": "podman checkpoint, copy, restore",
                "rounds_ms": [round(one, 1) for one in times],
                "rounds": found,
            }
        )
    return rows


def rescheduled(place: Place) -> dict[str, Any]:
    """What Kubernetes does by itself: the pod is deleted and comes up empty on another node.

    Milliseconds from the delete to the first answer of the successor; how many keys it has.
    """
    cluster = place.cluster
    cluster.kubectl("cordon", place.node)
    try:
        begin = time.monotonic()
        cluster.kubectl("delete", "pod", place.pod, "-n", NAMESPACE)
        cluster.wait_ready(place.pod, NAMESPACE)
        address = cluster.get("pod", place.pod, NAMESPACE)["status"]["podIP"]
        while True:
            try:
                keys = cluster.number(address, "DBSIZE")
                break
            except CommandFailed:
                if time.monotonic() - begin > 60:
                    raise
        took = (time.monotonic() - begin) * 1e3
    finally:
        cluster.kubectl("uncordon", place.node)
    return {"what": "delete and reschedule", "rounds_ms": [round(took, 1)], "keys_left": keys}
