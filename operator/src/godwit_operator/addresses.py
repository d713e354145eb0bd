"""Where moved addresses are: told to every agent, again and again.

Level-triggered: each time the whole list. A moved pod carries its address in an
annotation from the commit on. While such a pod moves once more, its Pod object
may be missing: then the migration speaks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from godwit_api.errors import GodwitError
from godwit_api.migration import ADDRESS_ANNOTATION, MIGRATION_KEY, PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Node, Pod
from godwit_operator.agents import AgentPool
from godwit_operator.kube import MIGRATIONS, NODES, PODS, KubeApi

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moved:
    """An address and the node where its pod is now."""

    ip: str
    node: str
    pod_uid: str


def wanted(pods: Iterable[Pod], migrations: Iterable[PodMigration]) -> list[Moved]:
    """The complete list; a running migration knows better than a Pod. Pure."""
    found: dict[str, Moved] = {}
    for pod in pods:
        if not pod.spec.node_name or pod.finished:
            continue
        for ip in filter(None, pod.metadata.annotations.get(ADDRESS_ANNOTATION, "").split(",")):
            found[ip] = Moved(ip, pod.spec.node_name, pod.metadata.uid)
    for migration in migrations:
        status, note = migration.status, migration.status.handover
        if migration.phase.final:
            continue
        for ip in migration.ips:
            if note.committed:
                found[ip] = Moved(ip, status.target_node, status.successor_uid)
            elif note.pod_was_moved and note.delete_intended:
                found[ip] = Moved(ip, status.source_node, status.pod_uid)
    return sorted(found.values(), key=lambda moved: moved.ip)


class Addresses:
    """Tells all agents; one round at a time."""

    def __init__(self, api: KubeApi, agents: AgentPool) -> None:
        self._api = api
        self._agents = agents
        self._lock = asyncio.Lock()

    async def sync(self) -> dict[str, GodwitError]:
        """One round. Failures by node; agents that are away get the next one."""
        async with self._lock:
            labels = MIGRATION_KEY  # every successor has it
            pods = msgspec.convert(await self._api.list(PODS, labels=labels), list[Pod])
            migrations = msgspec.convert(await self._api.list(MIGRATIONS), list[PodMigration])
            nodes = msgspec.convert(await self._api.list(NODES), list[Node])
            known = {node.name: node for node in nodes}
            request = pb.SyncAddressesRequest(
                addresses=[
                    pb.MovedAddress(
                        ip=moved.ip,
                        node=moved.node,
                        node_address=known[moved.node].address_for(moved.ip),
                        pod_uid=moved.pod_uid,
                    )
                    for moved in wanted(pods, migrations)
                    if moved.node in known and known[moved.node].address_for(moved.ip)
                ]
            )
            names = sorted(await self._agents.nodes())
            results = await asyncio.gather(*(self._tell(name, request) for name in names))
            return {name: failure for name, failure in results if failure is not None}

    async def _tell(
        self, node: str, request: pb.SyncAddressesRequest
    ) -> tuple[str, GodwitError | None]:
        try:
            await (await self._agents.agent(node)).sync_addresses(request)
        except GodwitError as failure:
            return node, failure
        return node, None

    async def keep(self, seconds: float) -> None:
        """Rounds for ever."""
        known: set[str] = set()
        while True:
            try:
                failures = await self.sync()
                for node in failures.keys() - known:
                    extra = {"node": node, "cause": str(failures[node])}
                    log.warning("addresses not told", extra=extra)
                for node in known - failures.keys():
                    log.info("addresses told again", extra={"node": node})
                known = set(failures)
            except GodwitError as failure:
                log.warning("addresses not told", extra={"cause": str(failure)})
            await asyncio.sleep(seconds)
