"""The Checking phase: asks the API and both agents, and collects every obstacle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.migration import (
    ADDRESS_ANNOTATION,
    HOME_NODE_ANNOTATION,
    CopiedVolume,
    ObstacleView,
    PodMigration,
)
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator.agents import AgentPool
from godwit_operator.checking import distinct, obstacle, pod_obstacles
from godwit_operator.kube import MIGRATIONS, NODES, PODS, KubeApi, find
from godwit_operator.messages import pod_ref, reference
from godwit_operator.status import Learned, describe_obstacles
from godwit_operator.storage import storage_of
from godwit_operator.targets import candidates, free, node_obstacles, storage_obstacles
from godwit_operator.volumes import (
    Storage,
    affinities,
    copied_volumes,
    volume_obstacles,
)


class Obstructed(Rejected):
    """Refused, with everything that was found."""

    def __init__(self, obstacles: list[ObstacleView], learned: Learned) -> None:
        super().__init__(Reason(obstacles[0].reason), describe_obstacles(obstacles))
        self.obstacles = obstacles
        self.learned = learned


@dataclass(frozen=True)
class Facts:
    """What the source's side has told; needed to ask targets."""

    report: pb.NodeReport
    memory_bytes: int
    files_bytes: int
    volumes: list[CopiedVolume] = field(default_factory=list)
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True)
class Inspection:
    """Effects of Checking, and of choosing a further target later."""

    api: KubeApi
    agents: AgentPool
    migration: PodMigration

    async def run(self) -> Learned:
        """What was learned, with the target. Raises Obstructed or Retryable."""
        migration = self.migration
        namespace, name = migration.metadata.namespace, migration.spec.pod_name
        body = await find(self.api, PODS, namespace, name)
        if body is None:
            message = f"There is no pod {name} in namespace {namespace}"
            raise Obstructed([obstacle(Reason.POD_NOT_FOUND, message)], Learned())
        pod = msgspec.convert(body, Pod)
        learned = _learned(pod)
        storage, copied = await storage_of(self.api, pod), migration.spec.copy_volumes
        others = await self._others(pod) if copied else []
        obstacles = [
            *pod_obstacles(pod),
            *volume_obstacles(pod, storage, copied, others),
            *await self._rivals(),
        ]
        facts = None
        if pod.spec.node_name and pod.status.phase == "Running":
            try:
                facts, told, more = await self._source(pod, storage)
            except Retryable as failure:
                if not obstacles:
                    raise  # it may answer soon, and nothing else stands in the way
                told, more = [obstacle(failure.reason, failure.message)], Learned()
            obstacles += told
            learned = learned.merged(more)
        target, told = await self._target(pod, facts)
        obstacles = distinct(obstacles + told)
        if obstacles:
            raise Obstructed(obstacles, learned)
        return learned.merged(Learned(status={"target_node": target, "epoch": 1, "obstacles": []}))

    async def _others(self, pod: Pod) -> list[Pod]:
        pods = msgspec.convert(await self.api.list(PODS), list[Pod])
        return [other for other in pods if other.spec.node_name == pod.spec.node_name]

    async def _rivals(self) -> list[ObstacleView]:
        """Other migrations of this pod that are under way, or were there first."""
        own = self.migration
        listed = await self.api.list(MIGRATIONS, own.metadata.namespace)
        for other in msgspec.convert(listed, list[PodMigration]):
            same = other.spec.pod_name == own.spec.pod_name
            if not same or other.metadata.uid == own.metadata.uid or _over(other):
                continue
            first = (other.metadata.creation_timestamp, other.metadata.uid) < (
                own.metadata.creation_timestamp,
                own.metadata.uid,
            )
            if first or other.status.epoch > 0:
                message = f"PodMigration {other.metadata.name} is moving pod {own.spec.pod_name}"
                return [obstacle(Reason.ALREADY_MIGRATING, message)]
        return []

    async def _source(
        self, pod: Pod, storage: Storage
    ) -> tuple[Facts | None, list[ObstacleView], Learned]:
        node = pod.spec.node_name
        if node not in await self.agents.nodes():
            message = f"No Godwit agent is running on node {node}, where the pod is"
            return None, [obstacle(Reason.AGENT_MISSING, message)], Learned()
        agent = await self.agents.agent(node)
        ref = pod_ref(self.migration, pod=pod)
        volumes = copied_volumes(pod, storage, self.migration.spec.copy_volumes)
        request = pb.CheckSourceRequest(
            migration=reference(self.migration, epoch=1), pod=ref, volumes=_volumes(volumes)
        )
        try:
            report = await agent.get_node()
            answer = await agent.check_source(request)
        except Retryable:
            raise
        except GodwitError as failure:
            return None, [obstacle(failure.reason, failure.message)], Learned()
        told = [ObstacleView(reason=o.reason, message=o.message) for o in answer.obstacles]
        problems = [ObstacleView(reason=o.reason, message=o.message) for o in report.problems]
        facts = Facts(
            report=report,
            memory_bytes=sum(c.memory_bytes for c in answer.containers),
            files_bytes=sum(c.files_bytes for c in answer.containers),
            volumes=volumes,
            storage=storage,
        )
        home = pod.metadata.annotations.get(HOME_NODE_ANNOTATION) or node
        note = {
            "containers": [container.name for container in answer.containers],
            "memory_bytes": facts.memory_bytes,
            "files_bytes": facts.files_bytes,
            "address_home": home,
            "volumes": [msgspec.to_builtins(one) for one in volumes],
        }
        return facts, problems + told, Learned(note=note)

    async def _target(self, pod: Pod, facts: Facts | None) -> tuple[str, list[ObstacleView]]:
        nodes = msgspec.convert(await self.api.list(NODES), list[Node])
        agents = await self.agents.nodes()
        wanted = self.migration.spec.target.node_name
        source = pod.spec.node_name
        if wanted is not None:
            if wanted == source:
                message = f"Pod {pod.metadata.name} runs on node {wanted} already"
                return wanted, [obstacle(Reason.TARGET_IS_SOURCE, message)]
            node = next((node for node in nodes if node.name == wanted), None)
            if node is None:
                message = f"There is no node {wanted}"
                return wanted, [obstacle(Reason.TARGET_NOT_FOUND, message)]
            return wanted, await self._ask(node, nodes, agents, pod, facts)
        chosen, refused = await self.choose(pod, source, nodes, agents, facts, set())
        if chosen is not None:
            return chosen, []
        why = "; ".join(refused[:8]) or "no other node matches the selector"
        return "", [obstacle(Reason.NO_TARGET, f"No node can take the pod: {why}")]

    async def choose(
        self,
        pod: Pod,
        source: str,
        nodes: list[Node],
        agents: Collection[str],
        facts: Facts | None,
        excluded: Collection[str],
    ) -> tuple[str | None, list[str]]:
        """The emptiest node without an obstacle, or why each cannot be."""
        pods = msgspec.convert(await self.api.list(PODS), list[Pod])
        room = {node.name: free(node, pods) for node in nodes}
        refused = []
        selector = self.migration.spec.target.node_selector
        for node in candidates(nodes, selector, source, room):
            if node.name in excluded:
                continue
            told = await self._ask(node, nodes, agents, pod, facts, pods=pods)
            if not told:
                return node.name, []
            refused.append(f"{node.name}: {describe_obstacles(told)}")
        return None, refused

    async def _ask(
        self,
        node: Node,
        nodes: list[Node],
        agents: Collection[str],
        pod: Pod,
        facts: Facts | None,
        pods: list[Pod] | None = None,
    ) -> list[ObstacleView]:
        """Obstacles of one target: from its objects, then from its agent."""
        if pods is None:
            pods = msgspec.convert(await self.api.list(PODS), list[Pod])
        here = pod.spec.node_name or self.migration.status.source_node
        source = next((n for n in nodes if n.name == here), None)
        told = node_obstacles(node, pod, source, agents, free(node, pods))
        if facts is not None:
            told += storage_obstacles(node, affinities(pod, facts.storage))
        if facts is None or node.name not in agents:
            return told
        migration = self.migration
        epoch = max(1, migration.status.epoch)
        request = pb.CheckTargetRequest(
            migration=reference(migration, epoch=epoch),
            pod=pod_ref(migration, pod=pod),
            source=await self.agents.peer(here),
            source_report=facts.report,
            memory_bytes=facts.memory_bytes,
            files_bytes=facts.files_bytes,
            volumes=_volumes(facts.volumes),
            apparmor_profiles=pod.spec.apparmor_profiles,
            seccomp_profiles=pod.spec.seccomp_profiles,
        )
        agent = await self.agents.agent(node.name)
        try:
            report = await agent.get_node()
            answer = await agent.check_target(request)
        except Retryable as failure:
            message = f"Node {node.name}: {failure.message}"
            if failure.reason in (Reason.AGENT_UNREACHABLE, Reason.TIMED_OUT):
                message += "; is the node agent's pod there running?"
            return [*told, obstacle(Reason.AGENT_UNREACHABLE, message)]
        except GodwitError as failure:
            return [*told, obstacle(failure.reason, f"Node {node.name}: {failure.message}")]
        found = [ObstacleView(reason=o.reason, message=o.message) for o in answer.obstacles]
        if not any(o.reason == Reason.CPU_DIFFERS for o in found):
            found += _cpu(facts.report, report)
        return told + found


def _volumes(volumes: list[CopiedVolume]) -> list[pb.CopiedVolume]:
    return [pb.CopiedVolume(name=one.name, path=one.path) for one in volumes]


def _cpu(source: pb.NodeReport, target: pb.NodeReport) -> list[ObstacleView]:
    missing = sorted(set(source.cpu_features) - set(target.cpu_features))
    if not missing or not target.cpu_features:
        return []
    names = ", ".join(missing[:16]) + (", …" if len(missing) > 16 else "")
    return [obstacle(Reason.CPU_DIFFERS, f"Node {target.node} lacks CPU features {names}")]


def _learned(pod: Pod) -> Learned:
    owner = pod.controller
    return Learned(
        status={
            "pod_uid": pod.metadata.uid,
            "pod_ip": pod.status.pod_ip,
            "pod_ips": pod.ips,
            "source_node": pod.spec.node_name,
        },
        note={
            "owner_kind": owner.kind if owner else "",
            "owner_name": owner.name if owner else "",
            "owner_uid": owner.uid if owner else "",
            "pod_was_moved": ADDRESS_ANNOTATION in pod.metadata.annotations,
        },
    )


def _over(migration: PodMigration) -> bool:
    return migration.phase.final
