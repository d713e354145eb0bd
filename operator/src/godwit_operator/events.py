"""Events on the migration and on its pod: few, and each with its own reason."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

from godwit_api.errors import GodwitError
from godwit_api.migration import API_VERSION, KIND, PodMigration
from godwit_operator.kube import EVENTS, ConflictError, KubeApi, NotFoundError

COMPONENT = "godwit-operator"
_MAX_NOTE = 1000  # the API server refuses more than 1024 bytes
log = logging.getLogger(__name__)


class Events:
    """Posts Events; a lost Event is logged and harms nothing."""

    def __init__(self, api: KubeApi, instance: str) -> None:
        self._api = api
        self._instance = instance

    async def post(
        self, migration: PodMigration, reason: str, note: str, *, warning: bool = False
    ) -> None:
        """Tell it on the migration, and on its pod once that is known."""
        meta, status = migration.metadata, migration.status
        regarding: list[dict[str, Any]] = [
            {"apiVersion": API_VERSION, "kind": KIND, "name": meta.name, "uid": meta.uid}
        ]
        pod_uid = status.successor_uid if status.handover.committed else status.pod_uid
        if pod_uid:
            name = status.successor_name if status.handover.committed else migration.spec.pod_name
            regarding.append({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod_uid})
        for target in regarding:
            await self._post(meta.namespace, target, reason, note, warning)

    async def _post(
        self, namespace: str, target: dict[str, Any], reason: str, note: str, warning: bool
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{target['name'][:220]}.{time.time_ns():x}",
                "namespace": namespace,
            },
            "eventTime": now,
            "reportingController": COMPONENT,
            "reportingInstance": self._instance,
            "action": "Migrate",
            "reason": reason,
            "note": note.encode()[:_MAX_NOTE].decode(errors="ignore"),
            "type": "Warning" if warning else "Normal",
            "regarding": target | {"namespace": namespace},
        }
        try:
            await self._api.create(EVENTS, namespace, body)
        except (GodwitError, ConflictError, NotFoundError) as failure:
            log.warning("event not posted", extra={"reason": reason, "cause": str(failure)})
