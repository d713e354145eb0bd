"""Two or more whole agents, with real gRPC, TLS and transfer streams on loopback."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import grpc

from fakes.authority import Authority
from fakes.host import IP, FakeNode, World, pod_state
from godwit_agent.config import Config
from godwit_agent.main import Process
from godwit_agent.server.identity import IdentityStore
from godwit_api.identity import OPERATOR_DNS_NAME
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc

MIGRATION = "01234567-89ab-cdef-0123-456789abcdef"
POD = "11111111-1111-1111-1111-111111111111"
SUCCESSOR = "22222222-2222-2222-2222-222222222222"
TIMEOUT = 20.0


class Node:
    """One node: its fake host outlives its agent process."""

    def __init__(self, cluster: Cluster, name: str, number: int) -> None:
        self.name, self.cluster = name, cluster
        self.address = f"127.0.0.{number}"
        self.fake = FakeNode(cluster.world, name)
        directory = cluster.directory / name
        self.identity = cluster.authority.node_store(directory / "id", name)
        self.config = Config(
            node_name=name,
            node_ip=self.address,
            enrollment_address="127.0.0.1:1",
            control_port=0,
            transfer_port=0,
            run_dir=directory / "run",
            journal_dir=directory / "journal",
            guard_seconds=600,
        )
        self.process: Process | None = None
        self.start()

    def start(self) -> None:
        """A new agent process on the same node."""
        self.process = Process(self.config, self.fake.host(), self.identity)
        self.config = dataclasses.replace(
            self.config,
            control_port=self.process.control.port,
            transfer_port=self.process.transfer.port,
        )
        self.process.start()
        self._channel: grpc.Channel = self.cluster.operator.node_channel(
            self.address, self.config.control_port, self.name
        )
        self.api = agent_pb2_grpc.NodeAgentStub(self._channel)

    def stop(self) -> None:
        """The agent process ends, as by SIGKILL as far as its memory is concerned."""
        self._channel.close()
        if self.process:
            self.process.agent.stop()
            self.process.transfer.stop()
            self.process.control.stop(0)
            self.process = None

    def peer(self) -> pb.PeerNode:
        return pb.PeerNode(
            name=self.name,
            address=self.address,
            control_port=self.config.control_port,
            transfer_port=self.config.transfer_port,
        )

    def peer_stub(self, identity: IdentityStore) -> tuple[grpc.Channel, agent_pb2_grpc.PeerStub]:
        channel = identity.node_channel(self.address, self.config.control_port, self.name)
        return channel, agent_pb2_grpc.PeerStub(channel)

    def steps(self, epoch: int = 1) -> list[str]:
        request = pb.GetMigrationRequest(uid=MIGRATION)
        records = self.api.GetMigration(request, timeout=TIMEOUT).records
        return [record.step for record in records if record.epoch == epoch]


class Cluster:
    """Nodes ``a`` (with the pod) and ``b``, and the operator's identity."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.world = World()
        self.authority = Authority()
        self.operator = self.authority.store(directory / "operator", OPERATOR_DNS_NAME)
        self.a = Node(self, "a", 1)
        self.b = Node(self, "b", 2)
        self.a.fake.pods_here[POD] = pod_state(POD)

    def close(self) -> None:
        for node in (self.a, self.b):
            if node.process:
                node.stop()

    # the operator's calls

    def ref(self, epoch: int = 1) -> pb.MigrationRef:
        return pb.MigrationRef(uid=MIGRATION, epoch=epoch, namespace="ns", name="move")

    def pod(self, uid: str = POD) -> pb.PodRef:
        return pb.PodRef(namespace="ns", name="redis-0", uid=uid, ip=IP)

    def prepare(
        self,
        epoch: int = 1,
        target: Node | None = None,
        volumes: tuple[pb.CopiedVolume, ...] = (),
    ) -> None:
        request = pb.PrepareTargetRequest(
            migration=self.ref(epoch),
            pod=self.pod(),
            source=self.a.peer(),
            containers=["app"],
            memory_bytes=1 << 20,
            volumes=volumes,
        )
        (target or self.b).api.PrepareTarget(request, timeout=TIMEOUT)

    def copy(
        self,
        epoch: int = 1,
        target: Node | None = None,
        budget_ms: int = 0,
        limit: int = 0,
        *,
        throttle: bool = False,
        compress: bool = False,
        post_copy: bool = False,
        volumes: tuple[pb.CopiedVolume, ...] = (),
    ) -> list[pb.CopyProgress]:
        request = pb.CopyRequest(
            migration=self.ref(epoch),
            pod=self.pod(),
            target=(target or self.b).peer(),
            freeze_budget_ms=budget_ms,
            bandwidth_limit_bytes_per_s=limit,
            throttle=throttle,
            compress=compress,
            post_copy=post_copy,
            volumes=volumes,
        )
        return list(self.a.api.Copy(request, timeout=TIMEOUT))

    def hand_over(self, epoch: int = 1, target: Node | None = None, uid: str = SUCCESSOR) -> str:
        """Guard, successor expected, at its gate."""
        node = target or self.b
        guard = pb.GuardRequest(migration=self.ref(epoch), pod=self.pod())
        self.a.api.Guard(guard, timeout=TIMEOUT)
        expect = pb.ExpectPodRequest(migration=self.ref(epoch), pod=self.pod(uid))
        node.api.ExpectPod(expect, timeout=TIMEOUT)
        node.fake.successor_arrives(uid)
        gate = pb.AwaitGateRequest(migration=self.ref(epoch))
        return str(node.api.AwaitGate(gate, timeout=TIMEOUT).native_ip)

    def ready(self, epoch: int = 1, target: Node | None = None, uid: str = SUCCESSOR) -> None:
        """Everything before the switch."""
        self.prepare(epoch, target)
        self.copy(epoch, target)
        self.hand_over(epoch, target, uid)

    def switch(
        self,
        epoch: int = 1,
        target: Node | None = None,
        *,
        timeout: float = TIMEOUT,
        freeze_timeout_ms: int = 0,
        budget_ms: int = 0,
        post_copy: bool = False,
    ) -> pb.SwitchResponse:
        request = pb.SwitchRequest(
            migration=self.ref(epoch),
            pod=self.pod(),
            target=(target or self.b).peer(),
            freeze_timeout_ms=freeze_timeout_ms,
            freeze_budget_ms=budget_ms,
            post_copy=post_copy,
        )
        return self.a.api.Switch(request, timeout=timeout)

    def finish(self, epoch: int = 1, target: Node | None = None) -> None:
        source = pb.FinishSourceRequest(migration=self.ref(epoch), pod=self.pod())
        self.a.api.FinishSource(source, timeout=TIMEOUT)
        done = pb.FinishTargetRequest(migration=self.ref(epoch))
        (target or self.b).api.FinishTarget(done, timeout=TIMEOUT)

    def abort_source(self, epoch: int = 1, *, lift_guard: bool) -> None:
        request = pb.AbortSourceRequest(
            migration=self.ref(epoch), pod=self.pod(), lift_guard=lift_guard
        )
        self.a.api.AbortSource(request, timeout=TIMEOUT)

    def abort_target(self, epoch: int = 1, target: Node | None = None) -> None:
        request = pb.AbortTargetRequest(migration=self.ref(epoch))
        (target or self.b).api.AbortTarget(request, timeout=TIMEOUT)


def cluster(directory: Path) -> Iterator[Cluster]:
    """Body of a fixture."""
    made = Cluster(directory)
    yield made
    made.close()
