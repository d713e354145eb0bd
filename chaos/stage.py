"""A Redis with a client on two nodes, and one migration of it that can be stopped."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from chaos.rows import Boundary
from lab import workloads
from lab.cluster import SYSTEM_NAMESPACE, TERMINAL_PHASES, Cluster, CommandFailed

NAMESPACE = "chaos"
POD = "redis-0"
_NODE_FAILPOINTS = "/run/godwit/failpoints"
_OPERATOR_FAILPOINTS = "/tmp/failpoints"
_OPERATOR = "app.kubernetes.io/component=operator"
_AGENT = "app.kubernetes.io/component=node-agent"


@dataclass
class Stage:
    """Where things are during one row."""

    cluster: Cluster
    source: str
    target: str
    address: str
    migration: str
    boundary: str = ""
    struck: bool = True
    """Whether the fault has met what it was meant for."""

    # -- failpoints ---------------------------------------------------------------------------
    def pause(self, boundary: Boundary) -> None:
        """The next process that comes to the boundary waits there."""
        self._shell(boundary, 'mkdir -p -m 700 "$1"; printf pause > "$1/$2"')

    def await_pause(self, boundary: Boundary, seconds: int = 60) -> bool:
        """Whether it has been reached in that time."""
        script = (
            f'n=0; until [ -e "$1/$2.hit" ]; do sleep 0.05; n=$((n+1)); [ $n -lt {seconds * 20} ]'
            " || exit 0; done; echo reached"
        )
        return "reached" in self._shell(boundary, script)

    def go(self, boundary: Boundary) -> None:
        """Whoever waits goes on; nothing waits there again."""
        self._shell(boundary, 'rm -f "$1/$2"; : > "$1/$2.go"')

    def clear(self, boundary: Boundary) -> None:
        """Leaves no failpoint, whatever has become of it."""
        self._shell(boundary, 'rm -f "$1/$2" "$1/$2.hit" "$1/$2.go"')

    def _shell(self, boundary: Boundary, script: str) -> str:
        words = ("sh", "-c", script, "failpoint")
        if boundary.side != "operator":
            node = self.source if boundary.side == "source" else self.target
            return self.cluster.node_exec(
                node, *words, _NODE_FAILPOINTS, boundary.failpoint, check=False
            )
        # the operator that runs now: one that was killed has taken its files along
        return self.cluster.kubectl(
            *("exec", "deploy/godwit-operator", "-n", SYSTEM_NAMESPACE, "--"),
            *(*words, _OPERATOR_FAILPOINTS, boundary.failpoint),
            check=False,
        )

    # -- the migration ------------------------------------------------------------------------
    def apply(self) -> None:
        """Begin."""
        self.cluster.apply(
            workloads.migration(
                self.migration,
                NAMESPACE,
                POD,
                self.target,
                timeouts={"freezeMilliseconds": 30_000, "handoverSeconds": 60},
            )
        )

    def status(self) -> dict[str, Any] | None:
        """What the migration says; None when it is gone, or nobody answers."""
        try:
            found = self.cluster.get("podmigration", self.migration, NAMESPACE)
        except (CommandFailed, json.JSONDecodeError):
            return None
        status = found.get("status", {})
        assert isinstance(status, dict)
        return status

    def final(self, seconds: float) -> dict[str, Any]:
        """Last status seen, when it is final, or has gone, or the time is over."""
        deadline, last = time.monotonic() + seconds, self.status() or {}
        while last.get("phase") not in TERMINAL_PHASES and time.monotonic() < deadline:
            if self.gone():
                return {**last, "phase": "Deleted"}
            time.sleep(0.5)
            last = self.status() or last
        return last

    def gone(self) -> bool:
        """Whether the object has been deleted."""
        words = ("get", "podmigration", self.migration, "-n", NAMESPACE, "--ignore-not-found")
        try:
            return not self.cluster.kubectl(*words, "-o", "name").strip()
        except CommandFailed:
            return False

    def pod(self) -> dict[str, Any]:
        """The pod, Ready."""
        self.cluster.wait_ready(POD, NAMESPACE)
        return self.cluster.get("pod", POD, NAMESPACE)

    def node_address(self, node: str) -> str:
        """InternalIP of a node."""
        addresses = self.cluster.get("node", node)["status"]["addresses"]
        return next(str(one["address"]) for one in addresses if one["type"] == "InternalIP")

    def boot(self, node: str) -> None:
        """A node that has crashed runs again, with its agent."""
        begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.cluster.run("boot", node)
        deadline = time.monotonic() + 180
        while not self._agent_since(node, begun):
            if time.monotonic() > deadline:
                raise CommandFailed(f"no agent on {node} 180 s after its boot")
            time.sleep(0.5)
        self.cluster.kubectl("wait", f"node/{node}", "--for=condition=Ready", "--timeout=60s")

    def _agent_since(self, node: str, begun: str) -> bool:
        """Whether a ready agent has been started there since: what was reported before the
        crash stays in the API for a while."""
        try:
            words = ("-l", _AGENT, f"--field-selector=spec.nodeName={node}")
            pods = self.cluster.list("pods", SYSTEM_NAMESPACE, *words)
        except (CommandFailed, json.JSONDecodeError):
            return False
        return any(
            one["ready"] and one["state"].get("running", {}).get("startedAt", "") >= begun
            for pod in pods
            for one in pod["status"].get("containerStatuses", [])
        )

    def await_operators(self, count: int) -> None:
        """So many of them, all Ready but those that stand still."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            pods = self.cluster.list("pods", SYSTEM_NAMESPACE, "-l", _OPERATOR)
            if len(pods) == count and sum(map(_is_ready, pods)) >= count - (count > 1):
                newest = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])
                if _is_ready(newest):
                    return
            time.sleep(0.5)
        raise CommandFailed(f"there are not {count} operators after 90 s")

    def operator_away_from(self, node: str) -> None:
        """The operator runs on another node: this one is about to go."""
        if self.operator_node() != node:
            return
        self.cluster.kubectl("cordon", node)
        try:
            self.cluster.kubectl(
                *("delete", "pods", "-n", SYSTEM_NAMESPACE, "-l", _OPERATOR, "--timeout=60s")
            )
            self.await_operators(1)
        finally:
            self.cluster.kubectl("uncordon", node)

    def operator_node(self) -> str:
        """Where the operator runs."""
        (pod,) = self.cluster.list("pods", SYSTEM_NAMESPACE, "-l", _OPERATOR)
        return str(pod["spec"]["nodeName"])


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def start(cluster: Cluster, node: str) -> str:
    """A Redis of a few MiB; its address."""
    cluster.apply(
        workloads.service("redis", NAMESPACE),
        workloads.stateful_set("redis", NAMESPACE, node=node),
    )
    cluster.wait_ready(POD, NAMESPACE)
    address = str(cluster.get("pod", POD, NAMESPACE)["status"]["podIP"])
    cluster.fill(address, 32)
    return address
