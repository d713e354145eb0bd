"""Sweeps: whatever a migration has left in the cluster goes when it is over.

Each migration cleans up after itself. This is for what it cannot see: pods that
a rule has gated in the second between its deletion and its end in the API
server, and objects of migrations that were removed by force. The stored manifest
of a bare pod is never swept: it may be all that is left of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from godwit_api.errors import GodwitError
from godwit_api.migration import MIGRATION_KEY, PodMigration
from godwit_api.pods import Pod
from godwit_operator.bridge import BRIDGE_PREFIX, MANAGER, MANAGER_LABEL, restore_patch
from godwit_operator.kube import (
    BINDINGS,
    ENDPOINT_SLICES,
    MIGRATIONS,
    PODS,
    POLICIES,
    SERVICES,
    ConflictError,
    KubeApi,
    NotFoundError,
    Resource,
    remove,
)
from godwit_operator.manifest import release_unchanged
from godwit_operator.queue import Queue

Object = dict[str, Any]
log = logging.getLogger(__name__)


def owned(pod: Pod, migrations: dict[str, PodMigration]) -> bool:
    """Whether a running migration will decide on this gated pod itself. Pure."""
    migration = migrations.get(pod.migration or "")
    if migration is None or (migration.phase.final and migration.phase != "Stalled"):
        return False
    status = migration.status
    # a rule by name, or a successor yet to be found: the migration's own business
    return not status.handover.committed or pod.metadata.uid == status.successor_uid


class Housekeeping:
    """One sweep at a time."""

    def __init__(self, api: KubeApi, queue: Queue) -> None:
        self._api = api
        self._queue = queue

    async def keep(self, seconds: float) -> None:
        """Sweeps for ever."""
        while True:
            try:
                await self.sweep()
            except (GodwitError, NotFoundError, ConflictError) as failure:
                log.warning("sweep not finished", extra={"cause": str(failure)})
            await asyncio.sleep(seconds)

    async def sweep(self) -> None:
        """Everything once. Objects are listed before migrations: none is taken for an orphan
        whose migration came later."""
        queued = self._queue.members()
        pods = await self._api.list(PODS, labels=MIGRATION_KEY)
        rules = [(kind, await self._api.list(kind)) for kind in (BINDINGS, POLICIES)]
        slices = await self._api.list(ENDPOINT_SLICES, labels=f"{MANAGER_LABEL}={MANAGER}")
        services = await self._api.list(SERVICES)
        listed = msgspec.convert(await self._api.list(MIGRATIONS), list[PodMigration])
        migrations = {migration.metadata.uid: migration for migration in listed}
        for uid in queued:
            if uid not in migrations or migrations[uid].phase.final:
                self._queue.leave(uid)  # removed by force
        for kind, found in rules:
            for item in found:
                uid = item["metadata"].get("labels", {}).get(MIGRATION_KEY)
                await self._drop(kind, None, item, uid, migrations)
        for item in slices:
            uid = item["metadata"].get("labels", {}).get(MIGRATION_KEY)
            await self._drop(ENDPOINT_SLICES, item["metadata"]["namespace"], item, uid, migrations)
        await self._services(services, migrations)
        await self._pods(pods, migrations)

    async def _drop(
        self,
        kind: Resource,
        namespace: str | None,
        item: Object,
        uid: str | None,
        migrations: dict[str, PodMigration],
    ) -> None:
        if uid is None or not _over(uid, migrations):
            return
        log.info("orphan removed", extra={"kind": kind.plural, "object": item["metadata"]["name"]})
        await remove(self._api, kind, namespace, item["metadata"]["name"])

    async def _services(self, services: list[Object], migrations: dict[str, PodMigration]) -> None:
        for service in services:
            for label in service["metadata"].get("labels") or {}:
                uid = label.removeprefix(BRIDGE_PREFIX)
                if label.startswith(BRIDGE_PREFIX) and _over(uid, migrations):
                    meta = service["metadata"]
                    patch = restore_patch(service, label)
                    await self._api.patch(SERVICES, meta["namespace"], meta["name"], patch)

    async def _pods(self, pods: list[Object], migrations: dict[str, PodMigration]) -> None:
        for body in pods:
            pod = msgspec.convert(body, Pod)
            if not pod.gated or owned(pod, migrations):
                continue
            log.info("gate lifted", extra={"pod": pod.metadata.name})
            await self._api.patch(
                PODS, pod.metadata.namespace, pod.metadata.name, release_unchanged(body)
            )


def _over(uid: str, migrations: dict[str, PodMigration]) -> bool:
    migration = migrations.get(uid)
    return migration is None or (migration.phase.final and migration.phase != "Stalled")
