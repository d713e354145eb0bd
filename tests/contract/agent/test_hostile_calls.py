"""Bytes that are no message, messages that are too large, calls by the wrong one or about what is
not: refused by name; nothing is done, and the pod moves as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from fakes.cluster import TIMEOUT, Cluster
from fakes.cluster import cluster as make_cluster
from godwit_api.errors import Rejected
from godwit_api.identity import node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc
from godwit_api.reasons import Reason
from godwit_api.wire import error_of

SERVICES = pb.DESCRIPTOR.services_by_name
METHODS = [
    f"/{SERVICES[service].full_name}/{method.name}"
    for service in ("NodeAgent", "Peer", "Checkpoints")
    for method in SERVICES[service].methods
]
OTHER = "99999999-89ab-cdef-0123-456789abcdef"
# What the agents do by themselves, whoever calls.
_QUIET = frozenset({"a.guard", "b.guard"})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from make_cluster(tmp_path)


def effects(cluster: Cluster) -> list[str]:
    return [one for one in cluster.world.effects if one not in _QUIET]


def send(channel: grpc.Channel, method: str, data: bytes) -> grpc.RpcError:
    """The error that raw bytes are answered with."""
    call = channel.unary_stream(
        method, request_serializer=lambda raw: raw, response_deserializer=lambda raw: raw
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(call(data, timeout=TIMEOUT))
    return caught.value


def garbage(count: int) -> list[bytes]:
    """The same every time: random bytes, and bytes that begin like a message."""
    chance = random.Random(7)
    good = pb.GuardRequest(migration=pb.MigrationRef(uid=OTHER, epoch=1)).SerializeToString()
    found = [chance.randbytes(chance.randrange(1, 60)) for _ in range(count)]
    return [*found, good[:-1], good * 3, b"\xff" * 20]


def test_bytes_that_are_no_message_do_nothing(cluster: Cluster) -> None:
    cluster.ready()
    before = effects(cluster)
    for name, identity in (("operator", cluster.operator), ("source", cluster.a.identity)):
        with identity.node_channel(
            cluster.b.address, cluster.b.config.control_port, "b"
        ) as channel:
            for method in METHODS:
                if method.endswith(("GetNode", "SyncAddresses")):  # nothing to fill in, or a list
                    continue
                for data in garbage(4):
                    error = send(channel, method, data)
                    assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, (name, method)
    assert effects(cluster) == before
    assert cluster.switch().committed
    cluster.finish()


def test_a_message_that_is_too_large_is_not_taken(cluster: Cluster) -> None:
    cluster.prepare()
    request = pb.CheckTargetRequest(
        migration=cluster.ref(), pod=cluster.pod(), source=cluster.a.peer()
    )
    request.source_report.kernel = "x" * (17 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        cluster.b.api.CheckTarget(request, timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    large = pb.ExpectPodRequest(migration=cluster.ref(), pod=cluster.pod())
    large.commands.add(container="app", post_start=["x" * (2 << 20)])
    with pytest.raises(grpc.RpcError) as caught:
        cluster.b.api.ExpectPod(large, timeout=TIMEOUT)
    assert error_of(caught.value).reason is Reason.MALFORMED
    cluster.copy()
    cluster.hand_over()
    assert cluster.switch().committed


def test_unknown_migrations_and_epochs_that_are_over(cluster: Cluster) -> None:
    cluster.ready(2)
    unknown = pb.MigrationRef(uid=OTHER, epoch=1, namespace="ns", name="other")
    channel, peer = cluster.b.peer_stub(cluster.a.identity)
    api = cluster.b.api
    with channel:
        for ref, reasons in (
            (unknown, {Reason.UNKNOWN_MIGRATION}),
            (cluster.ref(1), {Reason.STALE_EPOCH, Reason.UNKNOWN_MIGRATION}),
            (cluster.ref(3), {Reason.UNKNOWN_MIGRATION}),
        ):
            calls: list[tuple[Callable[..., object], Message]] = [
                (peer.Arm, pb.ArmRequest(migration=ref)),
                (peer.Restore, pb.RestoreRequest(migration=ref)),
                (peer.Run, pb.RunRequest(migration=ref)),
                (peer.AbortRestore, pb.AbortRestoreRequest(migration=ref)),
                (api.ExpectPod, pb.ExpectPodRequest(migration=ref, pod=cluster.pod())),
                (api.AwaitGate, pb.AwaitGateRequest(migration=ref)),
                (api.RunFenced, pb.RunRequest(migration=ref)),
            ]
            for call, request in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, timeout=TIMEOUT)
                error = error_of(caught.value)
                assert isinstance(error, Rejected)
                assert error.reason in reasons
    assert "b.resume" not in cluster.world.effects
    assert cluster.switch(2).committed


def test_only_the_target_of_a_migration_hears_its_decision(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.ready()
    stranger = cluster.authority.store(tmp_path / "c", node_dns_name("c"))
    with (
        stranger.node_channel(cluster.a.address, cluster.a.config.control_port, "a") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        agent_pb2_grpc.PeerStub(channel).Committed(
            pb.CommittedRequest(migration=cluster.ref()), timeout=TIMEOUT
        )
    assert error_of(caught.value).reason is Reason.WRONG_PEER
