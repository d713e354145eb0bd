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
from godwit_agent.hostops.archives import Archives
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import ONLY_RESTORED, NodeFacts, Tracking
from godwit_agent.hostops.ports import Host
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

_TCP_CLOSE = "tcp-close\n"  # criu(8)


class Restorer:
    """All pods that this node starts from archives."""

    def __init__(
        self, *, host: Host, target: Target, archives: Archives, layout: Layout, here: PeerNode
    ) -> None:
        self._host = host
        self._target = target
        self._archives = archives
        self._layout = layout
        self._here = here

    def inspect(self, namespace: str, name: str, key: bytes) -> dict[str, Any]:
        """The manifest of an archive that is complete and can be restored here. ``Rejected``
        with what is wrong with it, or with this node."""
        with self._archives.read(namespace, name) as file:
            about = contents.verify(file, key)
        if about.get("namespace") != namespace:
            message = f"the archive is of namespace {about.get('namespace')}, not of {namespace}"
            raise Rejected(Reason.ARCHIVE_FOREIGN, message)
        found = list(fitness.obstacles(about["node"], _facts(about), self._host.probe.facts()))
        if found:
            raise Rejected(found[0].reason, "; ".join(one.message for one in found))
        return about

    def prepare(self, migration: Migration, pod: Pod, name: str, key: bytes) -> None:
        """Store filled, pod expected: it restores from now on, or does not start."""
        about = self.inspect(pod.namespace, name, key)
        container = str(about["container"])
        self._target.prepare(
            migration, pod, self._here, (container,), memory_bytes=int(about["memoryBytes"])
        )
        sink = self._target.admit(migration.uid, migration.epoch, (container,), self._here.name)
        with self._archives.read(pod.namespace, name) as file:
            contents.load(file, key, container, sink)
        store = f"{self._layout.store_dir}/{migration.uid}/target/{container}"
        options = self._layout.local(f"{store}/criu.conf")
        text = options.read_text()
        if _TCP_CLOSE not in text:
            options.write_text(text + _TCP_CLOSE)
        self._target.expect(migration, pod, ONLY_RESTORED)

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
