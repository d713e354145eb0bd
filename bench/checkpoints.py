"""How long a pod stands still for a checkpoint, by its size: ``python3 -m bench.checkpoints``.

On a standing testbed (``make cluster``). Redis with a client, ``--rounds`` checkpoints of each
size, leave-running, in turn, so that what else the machine does meets all sizes alike.
Prints a table of medians in milliseconds, with the parts of the freeze.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
from typing import Any

from lab import workloads
from lab.cluster import SYSTEM_NAMESPACE, Cluster, say

_NAMESPACE = "bench-checkpoints"
_KEY = "bench-checkpoints"
_DIRECTORY = f"/var/lib/godwit/checkpoints/{_NAMESPACE}"
_PARTS = ("freeze", "dump", "images", "pack")


def take(cluster: Cluster, pod: str, name: str) -> dict[str, Any]:
    """One checkpoint; its status."""
    cluster.apply(
        {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": "PodCheckpoint",
            "metadata": {"name": name, "namespace": _NAMESPACE},
            "spec": {"podName": pod, "keySecretName": _KEY},
        }
    )
    cluster.kubectl(
        *("wait", "podcheckpoint", name, "-n", _NAMESPACE, "--timeout=600s"),
        "--for=jsonpath={.status.conditions[0].status}=True",
    )
    status = dict(cluster.get("podcheckpoint", name, _NAMESPACE)["status"])
    cluster.node_exec("n1", "rm", "-f", f"{_DIRECTORY}/{name}.godwit")
    return status


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="testbed (default: $GODWIT_TESTBED or godwit)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[64, 1024])
    options = parser.parse_args()
    cluster = Cluster(options.name)
    cluster.empty_namespace(_NAMESPACE)
    key = base64.b64encode(os.urandom(32)).decode()
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": _KEY, "namespace": SYSTEM_NAMESPACE},
            "type": "godwit.io/checkpoint-key",
            "data": {"key": key},
        }
    )
    addresses = {}
    for size in options.megabytes:
        pod = f"redis-{size}"
        cluster.apply(workloads.bare_pod(pod, _NAMESPACE, node="n1"))
        cluster.wait_ready(pod, _NAMESPACE)
        addresses[size] = cluster.get("pod", pod, _NAMESPACE)["status"]["podIP"]
        cluster.fill(addresses[size], size)
    seen: dict[int, list[dict[str, Any]]] = {size: [] for size in options.megabytes}
    for number in range(options.rounds):
        for size in options.megabytes:
            with cluster.counter(addresses[size], "count", "--interval-ms", "1") as client:
                status = take(cluster, f"redis-{size}", f"c{size}-{number}")
                report = client.stop()
            assert report["ok"], report
            seen[size].append(status)
            say(f"{size} MiB: {status['freezeMilliseconds']} ms {json.dumps(status['timings'])}")
    print("| memory | archive | freeze, median (least, most) | " + " | ".join(_PARTS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(_PARTS))
    for size, all_of_them in seen.items():
        freezes = [one["freezeMilliseconds"] for one in all_of_them]
        parts = [
            round(statistics.median(one["timings"].get(part, 0) / 1000 for one in all_of_them))
            for part in _PARTS
        ]
        archive = round(all_of_them[-1]["archiveBytes"] / 2**20)
        print(
            f"| {size} MiB | {archive} MiB | {statistics.median(freezes):.0f} "
            f"({min(freezes):.0f}, {max(freezes):.0f}) | " + " | ".join(map(str, parts)) + " |"
        )
    cluster.kubectl("delete", "namespace", _NAMESPACE, "--wait=false")
    cluster.kubectl("delete", "secret", _KEY, "-n", SYSTEM_NAMESPACE)


if __name__ == "__main__":
    main()
