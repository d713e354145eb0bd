"""A pod from an archive: the target's side of a move whose source is a file.

Nobody runs elsewhere whose word would be needed, so the commit is this node's
own. The pod keeps the address that this node's network gives it; connections
of the archive's time are restored closed, since their other ends are gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from godwit_agent import log
from godwit_agent.app import fitness
from godwit_agent.app.model import Migration, PeerNode, Pod
from godwit_agent.app.peers import Ran
from godwit_agent.app.target import Target
from godwit_agent.archive import contents
from godwit_agent.hostops.checkpoints.archives import Archives
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import ONLY_RESTORED, NodeFacts, Plan, Tracking
from godwit_agent.hostops.ports import Host
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

_TCP_CLOSE = "tcp-close\n"  # criu(8)


class Restorer:
    """All pods that this node starts from archives."""

    def __init__(self, *, host: Host, target: Target, layout: Layout, here: PeerNode) -> None:
        self._host = host
        self._target = target
        self._layout = layout
        self._here = here
        # The archive that was verified last: ``load`` verifies all of it again.
        self._verified: dict[str, dict[str, Any]] = {}

    def inspect(self, archives: Archives, namespace: str, name: str, key: bytes) -> dict[str, Any]:
        """The manifest of an archive that is complete and can be restored here. ``Rejected``
        with what is wrong with it, or with this node."""
        with archives.read(namespace, name) as file:
            about = contents.verify(file, key)
        if about.get("namespace") != namespace:
            message = f"the archive is of namespace {about.get('namespace')}, not of {namespace}"
            raise Rejected(Reason.ARCHIVE_FOREIGN, message)
        found = list(fitness.obstacles(about["node"], _facts(about), self._host.probe.facts()))
        if found:
            raise Rejected(found[0].reason, "; ".join(one.message for one in found))
        self._verified = {archives.place(namespace, name): about}
        return about

    def prepare(
        self,
        migration: Migration,
        pod: Pod,
        archives: Archives,
        name: str,
        key: bytes,
        plan: Plan = ONLY_RESTORED,
    ) -> None:
        """Store filled, pod expected: it restores from now on, or does not start."""
        about = self._verified.pop(archives.place(pod.namespace, name), None) or self.inspect(
            archives, pod.namespace, name, key
        )
        containers = contents.containers_of(about)
        self._target.prepare(
            migration, pod, self._here, containers, memory_bytes=int(about["memoryBytes"])
        )
        sink = self._target.admit(migration.uid, migration.epoch, containers, self._here.name)
        with archives.read(pod.namespace, name) as file:
            if contents.load(file, key, containers, sink) != about:
                message = f"the archive {pod.namespace}/{name} was replaced while it was read"
                raise Rejected(Reason.ARCHIVE_DAMAGED, message)
        for container in containers:
            self._close_connections(migration, container)
        self._target.expect(migration, pod, plan)

    def _close_connections(self, migration: Migration, container: str) -> None:
        store = f"{self._layout.store_dir}/{migration.uid}/target/{container}"
        options = self._layout.local(f"{store}/criu.conf")
        text = options.read_text()
        if _TCP_CLOSE not in text:
            options.write_text(text + _TCP_CLOSE)

    def complete(self, migration: Migration, *, deadline: float, active: Callable[[], bool]) -> Ran:
        """Waits for the pod to come to its gate, restores it, lets it run."""
        here = self._here.name
        self._target.await_gate(migration, deadline - 15.0, active)
        try:
            self._target.arm(migration, here)
            begin = time.monotonic()
            restored = self._target.restore(migration, here, deadline - 2.0)
            ran = self._target.run(migration, here)
        except (GodwitError, OSError) as error:
            log.warning("restore failed", uid=migration.uid, error=error)
            self._target.abort_restore(migration, here)
            raise
        took = int((time.monotonic() - begin) * 1e6)
        return Ran(ran.resumed_unix_ns, {**restored.timings_us, **ran.timings_us, "total": took})


def _facts(about: dict[str, Any]) -> NodeFacts:
    return NodeFacts(
        kernel=str(about["kernel"]),
        architecture=str(about["architecture"]),
        versions=dict(about["versions"]),
        cpu_features=tuple(about["cpuFeatures"]),
        tracking=Tracking.PAGE_HASH,
        problems=(),
        ip_pools=(),
    )
