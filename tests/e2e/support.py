"""What an end-to-end test does to a cluster, and what it observes from outside."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from lab import workloads
from lab.cluster import Cluster, CommandFailed
from lab.debris import wait_clean

_NUMBERS = itertools.count(1)


class Scene:
    """A test's namespace on the cluster."""

    def __init__(self, cluster: Cluster, test: str) -> None:
        self.cluster = cluster
        self.namespace = "t-" + hashlib.sha256(test.encode()).hexdigest()[:8]
        self.nodes = cluster.ready_nodes()

    def open(self) -> None:
        """Make the namespace, empty."""
        self.cluster.empty_namespace(self.namespace)

    def close(self, *kinds: str) -> None:
        """Delete the namespace; return when no migration of it is left, and none of ``kinds``.

        Its pods end while the next test begins; what they must not leave behind is asserted
        once, after the last test, and by each test that ends with ``assert_no_debris``.
        """
        self.cluster.kubectl("delete", "namespace", self.namespace, "--wait=false")
        for kind in ("podmigrations", *kinds):
            try:
                self.cluster.kubectl(
                    *("wait", kind, "--all", "-n", self.namespace),
                    *("--for=delete", "--timeout=180s"),
                )
            except CommandFailed as failure:
                if "no matching resources" not in str(failure):
                    raise

    # -- workloads ----------------------------------------------------------------------------
    def start(self, kind: str, name: str, node: str) -> str:
        """Start a Redis of ``kind`` (statefulset, deployment, pod) and return the pod's name."""
        make = {
            "statefulset": workloads.stateful_set,
            "deployment": workloads.deployment,
            "pod": workloads.bare_pod,
        }[kind]
        self.cluster.apply(
            workloads.service(name, self.namespace), make(name, self.namespace, node=node)
        )
        return self.ready_pod(name)

    def ready_pod(self, app: str) -> str:
        """Name of the one Ready pod labelled ``app``."""
        self.cluster.kubectl(
            *("wait", "pod", "-n", self.namespace, "-l", f"app={app}"),
            *("--for=create", "--timeout=60s"),
        )
        self.cluster.kubectl(
            *("wait", "pod", "-n", self.namespace, "-l", f"app={app}"),
            *("--for=condition=Ready", "--timeout=120s"),
        )
        (pod,) = self.cluster.list("pods", self.namespace, "-l", f"app={app}")
        return str(pod["metadata"]["name"])

    def pod(self, name: str) -> dict[str, Any]:
        """The Pod object."""
        return self.cluster.get("pod", name, self.namespace)

    def cluster_ip(self, name: str) -> str:
        """Address of a Service."""
        return str(self.cluster.get("service", name, self.namespace)["spec"]["clusterIP"])

    def other(self, *nodes: str) -> str:
        """A prepared node that is none of ``nodes``."""
        return str(next(node for node in self.nodes if node not in nodes))

    # -- migrations ---------------------------------------------------------------------------
    def apply_migration(self, pod: str, target: str, **spec: Any) -> str:
        """Apply a PodMigration and return its name."""
        name = f"m{next(_NUMBERS)}"
        self.cluster.apply(workloads.migration(name, self.namespace, pod, target, **spec))
        return name

    def migrate(self, pod: str, target: str, **spec: Any) -> dict[str, Any]:
        """Migrate, wait for the end, and return the final status."""
        name = self.apply_migration(pod, target, **spec)
        return self.final(name)

    def final(self, name: str, seconds: float = 180.0) -> dict[str, Any]:
        """Final status of a migration."""
        seen = self.cluster.watch_migration(name, self.namespace, seconds=seconds)
        status = seen["status"]
        assert isinstance(status, dict)
        return status

    def must_succeed(self, pod: str, target: str, **spec: Any) -> dict[str, Any]:
        """Migrate and insist on success."""
        status = self.migrate(pod, target, **spec)
        assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
        return status

    def record(
        self, workload: str, moves: list[dict[str, Any]], gap_ms: float | None = None
    ) -> None:
        """One line a move for docs/support.md, when ``GODWIT_SUPPORT_RESULTS`` names a file.

        ``gap_ms``: the longest wait that a client saw in all of the moves, where there is one.
        """
        for status in moves:
            self.note(
                workload=workload,
                freeze_ms=status["freezeMilliseconds"],
                gap_ms=None if gap_ms is None else round(gap_ms, 1),
                bytes=status["transferredBytes"],
            )

    def note(self, **line: Any) -> None:
        """One line of results."""
        path = os.environ.get("GODWIT_SUPPORT_RESULTS")
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def until_phase(self, name: str, phase: str, seconds: float = 120.0) -> None:
        """Return as soon as the migration has reached ``phase``, or gone past it."""

        class Reached(Exception):
            pass

        def look(item: dict[str, Any]) -> None:
            passed = item.get("status", {}).get("phaseTransitionTimestamps", ())
            if any(one["phase"] == phase for one in passed):
                raise Reached

        try:
            end = self.cluster.watch_migration(name, self.namespace, seconds=seconds, seen=look)
        except Reached:
            return
        raise AssertionError(f"{name} ended without {phase}: {end.get('status')}")

    def events(self, kind: str, name: str) -> list[dict[str, Any]]:
        """Events about an object."""
        return self.cluster.list(
            "events",
            self.namespace,
            f"--field-selector=involvedObject.kind={kind},involvedObject.name={name}",
        )

    # -- what must not be left ----------------------------------------------------------------
    def assert_no_debris(self, seconds: float = 150.0, *, pod_lives: bool = False) -> None:
        """Within a bounded time nothing of a migration is left on any node or in the API.

        The mark of a restored container (``pod_lives``) goes with the container.

        The kubelet takes its time to tear down a sandbox whose processes have gone.
        """
        left = wait_clean(self.cluster, self.nodes, seconds, pod_lives=pod_lives)
        assert not left, left


def refused(cluster: Cluster, manifest: dict[str, Any]) -> str:
    """What the API server says when it refuses ``manifest``; fails when it does not."""
    try:
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(manifest))
    except CommandFailed as failure:
        return str(failure)
    raise AssertionError("the API server has accepted it")
