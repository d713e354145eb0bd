"""Where moved addresses are: told to every agent, again and again.

Level-triggered: each time the whole list. A moved pod carries its address in an
annotation from the commit on. While such a pod moves once more, its Pod object
may be missing: then the migration speaks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
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


def routes(moved: Iterable[Moved], nodes: Mapping[str, Node]) -> Iterator[pb.MovedAddress]:
    """Each address with the node's own of the same family, by which it is reached. Pure."""
    for one in moved:
        node = nodes.get(one.node)
        address = node.address_for(one.ip) if node else ""
        if address:
            yield pb.MovedAddress(
                ip=one.ip, node=one.node, node_address=address, pod_uid=one.pod_uid
            )


def usable(moved: Iterable[pb.MovedAddress], node: Node | None) -> list[pb.MovedAddress]:
    """Without those of a family that ``node`` does not speak: it cannot route them. Pure."""
    if node is None or not node.address:
        return list(moved)
    return [one for one in moved if node.address_for(one.ip)]


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
            moved = list(routes(wanted(pods, migrations), known))
            names = sorted(await self._agents.nodes())
            results = await asyncio.gather(
                *(
                    self._tell(
                        name, pb.SyncAddressesRequest(addresses=usable(moved, known.get(name)))
                    )
                    for name in names
                )
            )
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
