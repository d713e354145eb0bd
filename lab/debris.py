"""What a migration must not leave behind, on any node and in the API."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from lab.cluster import Cluster

_SCRIPT = """
for d in guard expect $1; do ls -A /run/godwit/$d 2>/dev/null; done
ls -A /run/godwit/store 2>/dev/null
find /sys/fs/cgroup -path '*/godwit/*' -name cgroup.procs -exec cat {} + 2>/dev/null
pgrep -a criu
for n in /run/netns/*; do nsenter --net=$n nft list tables 2>/dev/null; done | grep godwit
# of a moved pod that lives its nodes send no redirects
nft list tables | grep godwit | if [ "$1" ]; then cat; else grep -v godwit_redirects; fi
true
"""

# One line for each task whose runtime is the wrapper: state, pod, container (empty: the sandbox).
_TASKS = """
cd /run/containerd/io.containerd.runtime.v2.task/k8s.io || exit 0
about() { ctr -n k8s.io containers info "$1" | sed -n "s/.*\\"$2\\": \\"\\(.*\\)\\".*/\\1/p"; }
for task in *; do
  grep -q godwit-runc "$task/options.json" 2>/dev/null || continue
  state=$(ctr -n k8s.io tasks ls | awk -v task="$task" '$1 == task { print $3 }')
  pod=$(about "$task" io.kubernetes.pod.namespace)/$(about "$task" io.kubernetes.pod.name)
  echo "$task ${state:-none} $pod $(about "$task" io.kubernetes.container.name)"
done
true
"""


def tasks(cluster: Cluster, nodes: Sequence[str]) -> list[str]:
    """What of the runtime handler is left on the nodes: sandboxes and containers."""
    return [
        f"{node}: {line}"
        for node in nodes
        for line in cluster.node_exec(node, "sh", "-c", _TASKS).splitlines()
    ]


def debris(cluster: Cluster, nodes: Sequence[str], *, pod_lives: bool = False) -> list[str]:
    """Names of what is left. The mark of a restored container (``pod_lives``) goes with it."""
    left = []
    for node in nodes:
        words = ("sh", "-c", _SCRIPT, "debris", "" if pod_lives else "restored")
        left += [f"{node}: {line}" for line in cluster.node_exec(node, *words).split("\n") if line]
    kinds = "mutatingadmissionpolicies,mutatingadmissionpolicybindings"
    left += [
        name for name in cluster.kubectl("get", kinds, "-o", "name").split() if "godwit" in name
    ]
    slices = json.loads(cluster.kubectl("get", "endpointslices", "-A", "-o", "json"))
    for item in slices["items"]:
        labels = item["metadata"].get("labels", {})
        if "godwit" in labels.get("endpointslice.kubernetes.io/managed-by", ""):
            left.append(f"endpointslice {item['metadata']['name']}")
    return left


def wait_clean(
    cluster: Cluster, nodes: Sequence[str], seconds: float, *, pod_lives: bool = False
) -> list[str]:
    """What is still left when the time is over; the kubelet takes its time for a sandbox."""
    deadline = time.monotonic() + seconds
    while left := debris(cluster, nodes, pod_lives=pod_lives):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return left
