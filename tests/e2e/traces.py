"""What an installation leaves on a cluster, and may take away only as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from lab.cluster import SYSTEM_NAMESPACE, Cluster

# Files, what containerd was told, kernel state.
_TRACES = """
ls -d /opt/godwit /etc/godwit /var/lib/godwit /run/godwit /run/criu.kdat 2>/dev/null
ls /opt/cni/bin /etc/containerd /etc/containerd/conf.d 2>/dev/null
containerd config dump | grep -i godwit
crictl info 2>/dev/null | grep -i godwit
cat /proc/sys/fs/pipe-user-pages-soft /proc/sys/fs/pipe-user-pages-hard /proc/sys/fs/pipe-max-size
ip -4 route show proto 87
ip -6 route show proto 87
nft list tables | grep -i godwit
grep godwit /proc/mounts
find /sys/fs/cgroup -maxdepth 3 -name '*godwit*'
true
"""


@dataclass
class Bridged:
    """The cluster whose pods share a bridge; ``before``: its traces before the installation."""

    cluster: Cluster
    before: dict[str, str]


def traces(cluster: Cluster) -> dict[str, str]:
    """By node, and of the API, everything that tells of Godwit or that it may change."""
    found = {node: cluster.node_exec(node, "sh", "-c", _TRACES) for node in ("n1", "n2")}
    for node in cluster.list("nodes", "default"):
        name, meta = node["metadata"]["name"], node["metadata"]
        marks = [*meta.get("labels", {}), *meta.get("annotations", {})]
        marks += [condition["type"] for condition in node["status"]["conditions"]]
        found[f"marks of {name}"] = " ".join(sorted(m for m in marks if "godwit" in m.lower()))
    kinds = (
        "clusterroles,clusterrolebindings,runtimeclasses,mutatingadmissionpolicies,"
        "mutatingadmissionpolicybindings,priorityclasses"
    )
    names = cluster.kubectl("get", kinds, "-o", "name").split()
    found["API"] = " ".join(sorted(name for name in names if "godwit" in name))
    system = cluster.kubectl(
        "get", "all,serviceaccounts,roles", "-n", SYSTEM_NAMESPACE, "-o", "name"
    )
    found["namespace"] = " ".join(sorted(n for n in system.split() if "default" not in n))
    return found
