"""Port to the node agents: who is there, and one call.

An agent is found by its pod; the certificate it shows must carry the name of
its node, whatever address it was reached by.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
import grpc.aio
import msgspec

from godwit_api.errors import Retryable
from godwit_api.identity import AGENT_CONTROL_PORT, AGENT_TRANSFER_PORT, node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb.agent_pb2_grpc import NodeAgentStub
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_api.wire import error_of
from godwit_operator.kube import PODS, KubeApi

if TYPE_CHECKING:  # the stubs generated for type checkers only
    from godwit_api.pb.agent_pb2_grpc import NodeAgentAsyncStub

AGENT_LABEL = "app.kubernetes.io/component=node-agent"
_SHORT_SECONDS = 10.0
T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What the operator shows to agents, and whom it trusts. PEM."""

    key: bytes
    chain: bytes
    authority: bytes


class Agent(Protocol):
    """One node's agent. Every call raises GodwitError and is idempotent."""

    async def get_node(self) -> pb.NodeReport: ...
    async def check_source(self, request: pb.CheckSourceRequest) -> pb.CheckSourceResponse: ...
    async def check_target(self, request: pb.CheckTargetRequest) -> pb.CheckTargetResponse: ...
    async def prepare_target(self, request: pb.PrepareTargetRequest) -> None: ...
    def copy(self, request: pb.CopyRequest, seconds: float) -> AsyncIterator[pb.CopyProgress]: ...
    async def guard(self, request: pb.GuardRequest) -> None: ...
    async def expect_pod(self, request: pb.ExpectPodRequest) -> None: ...
    async def await_gate(self, request: pb.AwaitGateRequest, seconds: float) -> None: ...
    async def switch(self, request: pb.SwitchRequest, seconds: float) -> pb.SwitchResponse: ...
    async def finish_source(self, request: pb.FinishSourceRequest) -> None: ...
    async def finish_target(self, request: pb.FinishTargetRequest) -> None: ...
    async def abort_source(self, request: pb.AbortSourceRequest) -> None: ...
    async def abort_target(self, request: pb.AbortTargetRequest) -> None: ...
    async def get_migration(self, uid: str) -> list[pb.MigrationRecord]: ...
    async def sync_addresses(self, request: pb.SyncAddressesRequest) -> None: ...
    async def run_fenced(self, request: pb.RunRequest) -> None: ...


class AgentPool(Protocol):
    """All agents. ``agent`` raises Retryable(AgentMissing) for a node without one."""

    async def nodes(self) -> dict[str, str]: ...
    async def agent(self, node: str) -> Agent: ...
    async def peer(self, node: str) -> pb.PeerNode: ...


class GrpcAgent:
    """Agent over an mTLS channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: NodeAgentAsyncStub = NodeAgentStub(channel)

    async def get_node(self) -> pb.NodeReport:
        return await _call(
            self._stub.GetNode(pb.GetNodeRequest(), timeout=_SHORT_SECONDS, wait_for_ready=True)
        )

    async def check_source(self, request: pb.CheckSourceRequest) -> pb.CheckSourceResponse:
        return await _call(self._stub.CheckSource(request, timeout=20, wait_for_ready=True))

    async def check_target(self, request: pb.CheckTargetRequest) -> pb.CheckTargetResponse:
        return await _call(self._stub.CheckTarget(request, timeout=20, wait_for_ready=True))

    async def prepare_target(self, request: pb.PrepareTargetRequest) -> None:
        await _call(self._stub.PrepareTarget(request, timeout=30))

    async def copy(self, request: pb.CopyRequest, seconds: float) -> AsyncIterator[pb.CopyProgress]:
        call = self._stub.Copy(request, timeout=seconds)
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        finally:
            call.cancel()

    async def guard(self, request: pb.GuardRequest) -> None:
        await _call(self._stub.Guard(request, timeout=_SHORT_SECONDS))

    async def expect_pod(self, request: pb.ExpectPodRequest) -> None:
        await _call(self._stub.ExpectPod(request, timeout=_SHORT_SECONDS))

    async def await_gate(self, request: pb.AwaitGateRequest, seconds: float) -> None:
        await _call(self._stub.AwaitGate(request, timeout=seconds))

    async def switch(self, request: pb.SwitchRequest, seconds: float) -> pb.SwitchResponse:
        return await _call(self._stub.Switch(request, timeout=seconds))

    async def finish_source(self, request: pb.FinishSourceRequest) -> None:
        await _call(self._stub.FinishSource(request, timeout=30))

    async def finish_target(self, request: pb.FinishTargetRequest) -> None:
        await _call(self._stub.FinishTarget(request, timeout=30))

    async def abort_source(self, request: pb.AbortSourceRequest) -> None:
        await _call(self._stub.AbortSource(request, timeout=30))

    async def abort_target(self, request: pb.AbortTargetRequest) -> None:
        await _call(self._stub.AbortTarget(request, timeout=30))

    async def get_migration(self, uid: str) -> list[pb.MigrationRecord]:
        request = pb.GetMigrationRequest(uid=uid)
        found = await _call(self._stub.GetMigration(request, timeout=_SHORT_SECONDS))
        return list(found.records)

    async def run_fenced(self, request: pb.RunRequest) -> None:
        await _call(self._stub.RunFenced(request, timeout=_SHORT_SECONDS))

    async def sync_addresses(self, request: pb.SyncAddressesRequest) -> None:
        await _call(self._stub.SyncAddresses(request, timeout=_SHORT_SECONDS))


async def _call(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from failure


class GrpcAgentPool:
    """Agents by their pods, channels by address and certificate."""

    def __init__(self, api: KubeApi, namespace: str, identity: Callable[[], Identity]) -> None:
        self._api = api
        self._namespace = namespace
        self._identity = identity
        self._channels: dict[str, tuple[str, Identity, grpc.aio.Channel]] = {}

    async def nodes(self) -> dict[str, str]:
        """Address of the agent of each node that has one running."""
        return {node: pod.status.host_ip for node, pod in (await self._pods()).items()}

    async def _pods(self) -> dict[str, Pod]:
        pods = msgspec.convert(
            await self._api.list(PODS, self._namespace, labels=AGENT_LABEL), list[Pod]
        )
        return {
            pod.spec.node_name: pod
            for pod in pods
            if pod.spec.node_name and pod.status.host_ip and pod.status.phase == "Running"
        }

    async def agent(self, node: str) -> Agent:
        return GrpcAgent(await self.channel(node))

    async def channel(self, node: str) -> grpc.aio.Channel:
        """To the agent of ``node``, and to nobody else."""
        peer = await self.peer(node)
        identity = self._identity()
        known = self._channels.get(node)
        if known is not None and known[:2] == (peer.address, identity):
            return known[2]
        if known is not None:
            await known[2].close(grace=60)
        credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.chain)
        options = [
            ("grpc.ssl_target_name_override", node_dns_name(node)),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", 10000),
        ]
        host = f"[{peer.address}]" if ":" in peer.address else peer.address
        channel = grpc.aio.secure_channel(f"{host}:{peer.control_port}", credentials, options)
        self._channels[node] = (peer.address, identity, channel)
        return channel

    async def peer(self, node: str) -> pb.PeerNode:
        pod = (await self._pods()).get(node)
        if pod is None:
            raise Retryable(Reason.AGENT_MISSING, f"No Godwit agent is running on node {node}")
        known = [one.ip for one in pod.status.host_ips]
        return pb.PeerNode(
            name=node,
            address=pod.status.host_ip,
            more_addresses=[ip for ip in known if ip != pod.status.host_ip],
            control_port=AGENT_CONTROL_PORT,
            transfer_port=AGENT_TRANSFER_PORT,
        )

    async def close(self) -> None:
        for _, _, channel in self._channels.values():
            await channel.close(grace=None)
