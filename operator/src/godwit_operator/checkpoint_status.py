"""Status of PodCheckpoint and PodRestore: written step by step, read again after a restart."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from godwit_api.errors import GodwitError, Rejected
from godwit_operator.kube import KubeApi, Resource

CHECKPOINTS = Resource("godwit.io", "v1alpha1", "podcheckpoints")
RESTORES = Resource("godwit.io", "v1alpha1", "podrestores")
FINAL = frozenset({"Succeeded", "Rejected", "Failed"})
Object = dict[str, Any]


def over(status: Object) -> bool:
    return status.get("phase") in FINAL


def phase_of(failure: GodwitError, *, touched: bool) -> str:
    """Rejected says that nothing was touched. Pure."""
    return "Rejected" if isinstance(failure, Rejected) and not touched else "Failed"


def condition(phase: str, reason: str, message: str, generation: int, now: datetime) -> Object:
    """The one condition. Pure."""
    status = {"Succeeded": "True", "Rejected": "False", "Failed": "False"}.get(phase, "Unknown")
    return {
        "type": "Complete",
        "status": status,
        "reason": reason,
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


class Reporter:
    """Writes the status of one object."""

    def __init__(self, api: KubeApi, kind: Resource, item: Object) -> None:
        self._api = api
        self._kind = kind
        self._meta = item["metadata"]
        self.status: Object = dict(item.get("status") or {})

    async def enter(
        self, phase: str, reason: str = "InProgress", message: str = "", **fields: Any
    ) -> None:
        """A new phase, and what has been learned."""
        now = datetime.now(UTC)
        shown = condition(phase, reason, message, self._meta.get("generation", 0), now)
        self.status |= {"phase": phase, "reason": reason, "message": message, **fields}
        self.status["conditions"] = [shown]
        patch = {"status": self.status}
        await self._api.patch(
            self._kind, self._meta["namespace"], self._meta["name"], patch, sub="status"
        )
