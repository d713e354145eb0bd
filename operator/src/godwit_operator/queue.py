"""How many migrations may run at once, per node and in the cluster.

In memory: the operator is one process, and a restarted one admits what was
under way before it admits anything new.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from godwit_api.errors import Retryable
from godwit_api.reasons import Reason


@dataclass
class Queue:
    """First come, first served, as far as nodes allow."""

    per_cluster: int
    per_node: int
    _running: dict[str, frozenset[str]] = field(default_factory=dict)
    _waiting: dict[str, frozenset[str]] = field(default_factory=dict)

    def enter(self, migration: str, nodes: Collection[str]) -> None:
        """Take a place. Raises Retryable(Pending) while there is none."""
        if migration in self._running:
            return
        wanted = frozenset(nodes)
        self._waiting[migration] = wanted
        told = self._obstacle(migration, wanted)
        if told is not None:
            raise Retryable(Reason.PENDING, told, delay_seconds=0.5)
        del self._waiting[migration]
        self._running[migration] = wanted

    def resume(self, migration: str, nodes: Collection[str]) -> None:
        """Count a migration that was under way already."""
        self._running.setdefault(migration, frozenset(nodes))

    def leave(self, migration: str) -> None:
        self._running.pop(migration, None)
        self._waiting.pop(migration, None)

    def members(self) -> set[str]:
        """All that run or wait."""
        return {*self._running, *self._waiting}

    def _obstacle(self, migration: str, wanted: frozenset[str]) -> str | None:
        if len(self._running) >= self.per_cluster:
            return f"Waiting: {len(self._running)} migrations run in the cluster"
        for node in sorted(wanted):
            busy = sum(node in nodes for nodes in self._running.values())
            earlier = 0
            for other, nodes in self._waiting.items():
                if other == migration:
                    break
                earlier += node in nodes
            if busy >= self.per_node:
                return f"Waiting: {busy} migrations run on node {node}"
            if busy + earlier >= self.per_node:
                return f"Waiting: others are first on node {node}"
        return None
