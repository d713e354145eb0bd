"""Whole migrations over real gRPC and transfer streams; only the hosts are fake."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fakes.cluster import MIGRATION, POD, SUCCESSOR, TIMEOUT, Cluster
from fakes.cluster import cluster as make_cluster
from fakes.host import IP
from godwit_agent.hostops.model import HostRoute, Outgoing, Packet
from godwit_agent.transfer.sender import Sender
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.identity import node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc
from godwit_api.reasons import Reason
from godwit_api.wire import error_of


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from make_cluster(tmp_path)


def test_pages_written_while_a_freeze_is_prepared_are_sent_before_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No longer at the copy's pace: a pod that was slowed down for its budget keeps within it."""
    monkeypatch.setattr("godwit_agent.memory.rounds.worth_another", lambda *_: True)
    effects = cluster.world.effects
    monkeypatch.setattr(Sender, "hurry", lambda _: effects.append("a.hurry"))
    cluster.ready()
    assert effects.count("a.hurry") == 1
    assert cluster.switch().committed
    first, last = effects.index("a.prepare_dump"), effects.index("a.freeze")
    assert effects[first:last].count("a.round") == 3


def test_a_pod_moves(cluster: Cluster) -> None:
    cluster.prepare()
    progress = cluster.copy()
    assert progress[-1].converged
    assert not any(p.converged for p in progress[:-1])
    assert cluster.hand_over() == "10.244.2.9"
    cluster.a.fake.captured = [Packet(time.time_ns() + 10**12, b"held")]
    got = cluster.switch()
    assert got.committed, got.failure
    assert got.freeze_us > 0
    assert {"freeze", "dump", "restore", "commit", "route", "run"} <= set(got.timings_us)
    assert cluster.b.fake.running
    assert b"held" in cluster.b.fake.injected
    assert cluster.a.fake.killed
    assert not cluster.a.fake.injected
    store = cluster.b.fake.stores_here[MIGRATION].got
    assert ("file", "app", b"data.txt", b"hello") in store
    assert ("image", "app", "pstree.img", b"tree") in store
    assert cluster.a.fake.held_here[IP].pod_uid == POD
    cluster.finish()
    assert cluster.a.steps() == ["Finished"]
    assert cluster.b.steps() == ["Finished"]
    assert not cluster.a.fake.guard_files
    assert not cluster.b.fake.expected_pods
    assert not cluster.b.fake.marked_pods
    assert not cluster.b.fake.stores_here


def test_the_pods_own_connections_go_along(cluster: Cluster) -> None:
    here = (bytes((10, 244, 1, 7)), 40001)
    service, server = (bytes((10, 96, 0, 9)), 80), (bytes((10, 244, 3, 3)), 8080)
    cluster.a.fake.opened = (Outgoing(6, here, service, server, 6, 3600, b""),)
    cluster.ready()
    assert cluster.switch().committed
    assert tuple(cluster.b.fake.adopted) == cluster.a.fake.opened
    adopted = cluster.world.effects
    assert adopted.index("b.adopt") < adopted.index("b.resume")


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 1},
        {"client_address": b"abc"},
        {"server_address": bytes(16)},
        {"client_port": 0},
        {"service_port": 65536},
        {"status": 1 << 16},
        {"tcp": bytes(65)},
    ],
)
def test_a_malformed_connection_is_refused(cluster: Cluster, change: dict[str, Any]) -> None:
    good = {
        "protocol": 6, "client_address": bytes(4), "client_port": 1, "service_address": bytes(4),
        "service_port": 1, "server_address": bytes(4), "server_port": 1, "timeout_seconds": 1,
    }  # fmt: skip
    cluster.ready()
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    request = pb.RestoreRequest(
        migration=cluster.ref(), outgoing=[pb.Outgoing(**{**good, **change})]
    )
    with channel, pytest.raises(grpc.RpcError) as caught:
        stub.Restore(request, timeout=TIMEOUT)
    assert error_of(caught.value).reason is Reason.MALFORMED


def test_the_order_of_the_switch(cluster: Cluster) -> None:
    cluster.ready()
    cluster.switch()
    order = [
        "b.start_daemons",
        "a.dump_gated",
        "a.hold_syns",
        "a.freeze",
        "a.drop",
        "a.dump",
        "a.dumped",
        "a.images",
        "b.complete",
        "b.restore",
        "a.take_unread",
        "b.route_local",
        "a.route_via",
        "b.open_door",
        "b.resume",
        "a.hold_address",
        "a.finish_dump",
        "a.kill",
    ]
    found = [cluster.world.index(effect) for effect in order]
    assert found == sorted(found), cluster.world.since("a.hold_syns")
    # changes are read while CRIU dumps, and before its images go
    assert cluster.world.index("a.drop") < cluster.world.index("a.final_memory")
    assert cluster.world.index("a.final_memory") < cluster.world.index("b.complete")


def test_a_repeated_switch_answers_the_same(cluster: Cluster) -> None:
    cluster.ready()
    first = cluster.switch()
    count = len(cluster.world.effects)
    assert cluster.switch() == first
    assert len(cluster.world.effects) == count
    cluster.finish()
    cluster.finish()


def test_a_process_that_ended_before_the_freeze_is_said_to_have_ended(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.fake.ended = ["app"]
    with pytest.raises(grpc.RpcError) as caught:
        cluster.switch()
    assert error_of(caught.value).reason is Reason.SOURCE_EXITED
    assert "a.freeze" not in cluster.world.effects


@pytest.mark.parametrize("effect", ["freeze", "dump", "final_memory"])
def test_a_process_that_is_killed_in_the_freeze_is_said_to_have_ended(
    cluster: Cluster, effect: str
) -> None:
    """Whatever CRIU says of it: nothing is left to go on."""
    cluster.ready()

    def killed() -> None:
        cluster.a.fake.ended = ["app"]
        if effect != "freeze":
            raise OSError("a thread is gone")

    cluster.world.fail[f"a.{effect}"] = killed
    got = cluster.switch()
    assert not got.committed
    assert got.failure.reason == Reason.SOURCE_EXITED
    assert "container app: its process has ended" in got.failure.message
    if effect == "freeze":
        assert "a.dump" not in cluster.world.effects, "CRIU would wait for its threads"
    assert cluster.a.steps() == ["Thawed"]
    assert not cluster.a.fake.frozen_ids


FAILURES = [
    "a.hold_syns",
    "a.freeze",
    "a.drop",
    "a.dump",
    "a.dumped",
    "a.final_memory",
    "a.final_files",
    "a.images",
    "b.complete",
    "b.restore",
]


@pytest.mark.parametrize("effect", FAILURES)
def test_every_failure_before_the_commit_thaws(cluster: Cluster, effect: str) -> None:
    cluster.ready()
    cluster.world.fail[effect] = OSError(f"{effect} is broken")
    got = cluster.switch()
    assert not got.committed
    assert got.failure.reason
    world = cluster.world
    assert "b.resume" not in world.effects
    assert "b.open_door" not in world.effects
    assert "a.kill" not in world.effects
    assert not cluster.a.fake.frozen_ids
    back = ["a.reject", "a.thaw", "a.lift", "a.close_network"]
    found = [world.index(step) for step in back]
    assert found == sorted(found)
    assert cluster.a.steps() == ["Thawed"]
    assert "b.abort_restore" in world.effects
    assert cluster.b.steps() == ["Refused"]
    # the successor must not start empty as long as its object may live
    assert SUCCESSOR in cluster.b.fake.expected_pods
    # and the answer stays
    assert cluster.switch() == got
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()
    assert not cluster.b.fake.expected_pods
    # whose kubelet may not have heard of it yet
    assert SUCCESSOR in cluster.b.fake.marked_pods
    assert not cluster.a.fake.guard_files
    assert cluster.a.steps() == ["Aborted"]


def test_held_packets_come_back_with_a_rollback(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.fake.captured = [Packet(time.time_ns() + 10**12, b"held")]
    cluster.a.fake.unread = (b"in a socket",)
    cluster.world.fail["b.restore"] = OSError("no")
    cluster.switch()
    assert cluster.a.fake.injected == [b"held"]
    assert cluster.a.fake.unread == (b"in a socket",)
    assert cluster.world.index("a.lift") < cluster.world.index("a.inject")


def test_unread_datagrams_come_before_what_was_held(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.fake.unread = (b"in a socket",)
    cluster.a.fake.captured = [Packet(time.time_ns() + 10**12, b"held")]
    assert cluster.switch().committed
    assert cluster.b.fake.injected == [b"in a socket", b"held"]
    # only the commit takes them out of the source's sockets
    effects = cluster.world.effects
    assert effects.index("a.find_unread") < effects.index("b.restore")
    assert effects.index("b.restore") < effects.index("a.take_unread")


def test_a_freeze_ends_in_time(cluster: Cluster) -> None:
    cluster.ready()
    cluster.world.fail["a.dumped"] = lambda: time.sleep(0.7)
    start = time.monotonic()
    got = cluster.switch(freeze_timeout_ms=300)
    assert time.monotonic() - start < 5
    assert not got.committed
    assert got.failure.reason == Reason.FREEZE_TIMEOUT
    assert not cluster.a.fake.frozen_ids


def test_a_freeze_ends_in_time_where_nothing_is_sent(cluster: Cluster) -> None:
    """A look at memory that finds nothing new meets no broken connection."""
    cluster.ready()
    cluster.a.fake.vast = True
    got = cluster.switch(freeze_timeout_ms=300)
    assert not got.committed
    assert got.failure.reason == Reason.FREEZE_TIMEOUT
    assert not cluster.a.fake.frozen_ids


def test_a_budget_that_cannot_be_met_is_refused_before_the_freeze(cluster: Cluster) -> None:
    cluster.ready()
    got = cluster.switch(budget_ms=10)
    assert got.failure.reason == Reason.FREEZE_BUDGET_EXCEEDED
    assert "a.freeze" not in cluster.world.effects
    assert cluster.switch().committed


def test_shared_memory_is_left_out_of_the_dump_and_must_be_taken(cluster: Cluster) -> None:
    cluster.a.fake.shared = ((1, 77), (1, 78))
    cluster.ready()
    got = cluster.switch()
    assert got.committed, got.failure
    assert cluster.a.fake.left_out == ((1, 77), (1, 78))
    effects = cluster.world.effects
    assert effects.index("a.announce") < effects.index("a.round")
    assert effects.index("b.restore") < effects.index("b.require_shared")
    assert effects.index("b.require_shared") < effects.index("b.resume")


def test_a_copy_without_its_shared_memory_never_runs(cluster: Cluster) -> None:
    cluster.ready()

    def lacks() -> None:
        raise Aborted(Reason.VERIFY_FAILED, "shared memory 77 has not been taken")

    cluster.world.fail["b.require_shared"] = lacks
    got = cluster.switch()
    assert got.failure.reason == Reason.VERIFY_FAILED
    assert "b.resume" not in cluster.world.effects
    assert not cluster.a.fake.frozen_ids


def test_what_shared_memory_adds_to_a_freeze_counts_before_it(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.fake.shared_us = 500_000
    got = cluster.switch(budget_ms=600)
    assert got.failure.reason == Reason.FREEZE_BUDGET_EXCEEDED
    assert "a.freeze" not in cluster.world.effects
    assert cluster.switch(budget_ms=900).committed


def test_a_copy_that_does_not_converge_within_its_budget_is_over(cluster: Cluster) -> None:
    cluster.prepare()
    with pytest.raises(grpc.RpcError) as caught:
        cluster.copy(budget_ms=1)
    assert error_of(caught.value).reason is Reason.FREEZE_BUDGET_EXCEEDED


def test_a_pod_that_writes_too_fast_is_slowed_down_until_its_freeze(cluster: Cluster) -> None:
    cluster.a.fake.dirty = [1 << 20]
    cluster.prepare()
    with pytest.raises(grpc.RpcError) as caught:
        cluster.copy(budget_ms=190, limit=10_000_000)
    assert error_of(caught.value).reason is Reason.FREEZE_BUDGET_EXCEEDED
    assert "a.throttle" not in cluster.world.effects
    told = cluster.copy(budget_ms=190, limit=10_000_000, throttle=True)
    assert told[-1].converged
    assert told[-1].predicted_freeze_ms <= 190
    shares = [one.cpu_percent for one in told]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 100
    assert shares[-1] in {35, 20, 10}
    assert cluster.a.fake.cpus
    cluster.hand_over()
    assert cluster.a.fake.cpus, "it would write as fast as before until it is frozen"
    assert cluster.switch().committed
    cluster.finish()
    assert not cluster.a.fake.cpus


@pytest.mark.parametrize("end", ["refused", "aborted", "restarted"])
def test_a_pod_that_stays_has_its_cpu_time_back(cluster: Cluster, end: str) -> None:
    cluster.a.fake.dirty = [1 << 20]
    cluster.prepare()
    if end == "refused":
        with pytest.raises(grpc.RpcError) as caught:
            cluster.copy(budget_ms=151, limit=10_000_000, throttle=True)
        assert "10% of its CPU time" in error_of(caught.value).message
        assert "a.throttle" in cluster.world.effects
        cluster.abort_source(lift_guard=True)
    else:
        cluster.copy(budget_ms=190, limit=10_000_000, throttle=True)
        assert cluster.a.fake.cpus
        if end == "aborted":
            cluster.abort_source(lift_guard=True)
        else:
            cluster.a.stop()
            cluster.a.fake.cpus["cid-app"] = 0.2  # as after SIGKILL
            cluster.a.start()
    assert not cluster.a.fake.cpus


def test_compressed_pages_arrive(cluster: Cluster) -> None:
    cluster.prepare()
    plain = cluster.copy(compress=False)[-1].transferred_bytes
    packed = cluster.copy(compress=True)[-1].transferred_bytes
    assert packed < plain / 2
    assert sum(
        entry[4]
        for entry in cluster.b.fake.stores_here[MIGRATION].got
        if entry[0] == "pages" and isinstance(entry[4], int)
    ) == 2 * ((1 << 20) + 4096)


def test_what_keeps_a_switch_from_beginning_can_be_repeated(cluster: Cluster) -> None:
    cluster.ready()
    cluster.world.fail["a.dump_gated"] = Retryable(Reason.DUMP_FAILED, "runc is slow today")
    with pytest.raises(grpc.RpcError) as caught:
        cluster.switch()
    assert error_of(caught.value).reason is Reason.DUMP_FAILED
    assert "a.freeze" not in cluster.world.effects
    cluster.world.fail.clear()
    assert cluster.switch().committed


def test_a_lost_copy_is_made_again(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.stop()
    cluster.a.start()
    assert cluster.switch().committed


def test_the_next_epoch_goes_back_to_the_source_node(cluster: Cluster) -> None:
    cluster.ready()
    cluster.world.fail["b.restore"] = OSError("no")
    assert not cluster.switch().committed
    cluster.world.fail.clear()
    cluster.abort_source(lift_guard=False)
    cluster.abort_target()
    assert cluster.a.fake.guard_files
    other = "33333333-3333-3333-3333-333333333333"
    cluster.ready(2, cluster.a, other)
    got = cluster.switch(2, cluster.a)
    assert got.committed, got.failure
    assert "a.route_via" not in cluster.world.effects
    assert cluster.a.fake.routes_here[IP].interface == "veth9"
    cluster.finish(2, cluster.a)
    with pytest.raises(grpc.RpcError) as caught:
        cluster.switch(1)
    assert error_of(caught.value).reason is Reason.STALE_EPOCH


def test_nothing_is_aborted_after_the_commit(cluster: Cluster) -> None:
    cluster.ready()
    cluster.switch()
    with pytest.raises(grpc.RpcError) as caught:
        cluster.abort_source(lift_guard=True)
    assert isinstance(error_of(caught.value), Rejected)
    with pytest.raises(grpc.RpcError) as caught:
        cluster.abort_target()
    assert isinstance(error_of(caught.value), Rejected)


def test_names_decide_who_may_call(cluster: Cluster, tmp_path: Path) -> None:
    cluster.ready()
    node = cluster.authority.store(tmp_path / "c", node_dns_name("c"))
    with node.node_channel(cluster.b.address, cluster.b.config.control_port, "b") as channel:
        stub = agent_pb2_grpc.NodeAgentStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNode(pb.GetNodeRequest(), timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        peer = agent_pb2_grpc.PeerStub(channel)
        ref = cluster.ref()
        calls: list[Callable[[], object]] = [
            lambda: peer.Arm(pb.ArmRequest(migration=ref), timeout=TIMEOUT),
            lambda: peer.Restore(pb.RestoreRequest(migration=ref), timeout=TIMEOUT),
            lambda: peer.Run(pb.RunRequest(migration=ref), timeout=TIMEOUT),
            lambda: peer.AbortRestore(pb.AbortRestoreRequest(migration=ref), timeout=TIMEOUT),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert error_of(caught.value).reason is Reason.WRONG_PEER
    with cluster.operator.node_channel(
        cluster.b.address, cluster.b.config.control_port, "b"
    ) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            agent_pb2_grpc.PeerStub(channel).Run(
                pb.RunRequest(migration=cluster.ref()), timeout=TIMEOUT
            )
        assert error_of(caught.value).reason is Reason.WRONG_PEER
    assert "b.resume" not in cluster.world.effects


def slow_proxy(listener: socket.socket, address: str, port: int) -> None:
    """One connection, whose first byte takes half a second."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    inner, _ = listener.accept()
    time.sleep(0.5)
    with inner, socket.create_connection((address, port), timeout=10) as outer:
        outer.settimeout(None)
        back = threading.Thread(target=pump, args=(outer, inner), daemon=True)
        back.start()
        pump(inner, outer)
        back.join(10)


def test_a_busy_node_has_time_for_its_handshake(cluster: Cluster) -> None:
    node = cluster.b
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = (listener, node.address, node.config.control_port)
        proxy = threading.Thread(target=slow_proxy, args=arguments, daemon=True)
        proxy.start()
        port = int(listener.getsockname()[1])
        with cluster.operator.node_channel("127.0.0.1", port, "b") as channel:
            stub = agent_pb2_grpc.NodeAgentStub(channel)
            assert stub.GetNode(pb.GetNodeRequest(), timeout=TIMEOUT).node == "b"
        proxy.join(15)


def test_a_call_needs_a_deadline(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cluster.a.api.GetNode(pb.GetNodeRequest())
    assert error_of(caught.value).reason is Reason.MALFORMED


def test_checks_tell_everything_at_once(cluster: Cluster) -> None:
    report = cluster.a.api.GetNode(pb.GetNodeRequest(), timeout=TIMEOUT)
    assert (report.node, report.address, report.dirty_tracking) == (
        "a",
        "127.0.0.1",
        "userfaultfd-wp",
    )
    source = cluster.a.api.CheckSource(
        pb.CheckSourceRequest(migration=cluster.ref(), pod=cluster.pod()), timeout=TIMEOUT
    )
    assert not source.obstacles
    assert source.containers[0].name == "app"
    cluster.b.fake.cpu = ("sse",)
    report.versions["criu"] = "3.0"
    request = pb.CheckTargetRequest(
        migration=cluster.ref(),
        pod=cluster.pod(),
        source=cluster.a.peer(),
        source_report=report,
    )
    found = cluster.b.api.CheckTarget(request, timeout=TIMEOUT).obstacles
    assert {o.reason for o in found} == {Reason.CPU_DIFFERS, Reason.VERSION_DIFFERS}


def test_a_target_names_the_profiles_that_it_lacks(cluster: Cluster) -> None:
    request = pb.CheckTargetRequest(
        migration=cluster.ref(),
        pod=cluster.pod(),
        source=cluster.a.peer(),
        source_report=cluster.a.api.GetNode(pb.GetNodeRequest(), timeout=TIMEOUT),
        apparmor_profiles=["everywhere", "here-only"],
        seccomp_profiles=["profiles/audit.json"],
    )
    found = cluster.b.api.CheckTarget(request, timeout=TIMEOUT).obstacles
    assert {o.reason for o in found} == {Reason.PROFILE_MISSING}
    said = " ".join(o.message for o in found)
    assert "here-only" in said
    assert "profiles/audit.json" in said
    assert "everywhere" not in said
    request.seccomp_profiles[:] = ["../../etc/shadow"]
    with pytest.raises(grpc.RpcError) as caught:
        cluster.b.api.CheckTarget(request, timeout=TIMEOUT)
    assert error_of(caught.value).reason is Reason.MALFORMED


def test_addresses_follow_the_list(cluster: Cluster) -> None:
    cluster.ready()
    cluster.switch()
    here = pb.MovedAddress(ip=IP, node="b", node_address="127.0.0.2", pod_uid=SUCCESSOR)
    empty = cluster.a.api.SyncAddresses(pb.SyncAddressesRequest(), timeout=TIMEOUT)
    assert not empty.released, "a list from before the switch must not take it back"
    cluster.finish()
    wanted = pb.SyncAddressesRequest(addresses=[here])
    for node in (cluster.a, cluster.b):
        assert not node.api.SyncAddresses(wanted, timeout=TIMEOUT).released
        assert node.fake.without_redirects == {IP}
    assert cluster.a.fake.routes_here[IP].via == "127.0.0.2"
    assert cluster.b.fake.routes_here[IP].interface == "veth9"
    gone = cluster.a.api.SyncAddresses(pb.SyncAddressesRequest(), timeout=TIMEOUT)
    assert list(gone.released) == [IP]
    assert IP not in cluster.a.fake.routes_here
    assert not cluster.a.fake.without_redirects
    cluster.b.api.SyncAddresses(pb.SyncAddressesRequest(), timeout=TIMEOUT)
    assert IP in cluster.b.fake.routes_here, "the list may be older than the pod's move"
    cluster.b.fake.routes_here[IP] = HostRoute(IP, None, None)
    cluster.b.api.SyncAddresses(pb.SyncAddressesRequest(), timeout=TIMEOUT)
    assert IP not in cluster.b.fake.routes_here


@pytest.mark.parametrize("moment", ["copying", "copied", "expected"])
def test_a_target_that_was_restarted_says_so(cluster: Cluster, moment: str) -> None:
    cluster.prepare()
    if moment != "copying":
        cluster.copy()
    if moment == "expected":
        cluster.hand_over()
    cluster.b.stop()
    cluster.b.start()
    gate = pb.AwaitGateRequest(migration=cluster.ref())
    goes_on: dict[str, Callable[[], object]] = {
        "copying": cluster.copy,  # the operator's next try
        "copied": cluster.hand_over,
        "expected": lambda: cluster.b.api.AwaitGate(gate, timeout=TIMEOUT),
    }
    with pytest.raises(grpc.RpcError) as caught:
        goes_on[moment]()
    error = error_of(caught.value)
    assert error.reason is Reason.AGENT_RESTARTED
    assert isinstance(error, Aborted)
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()
    assert cluster.b.steps() == ["Aborted"]


def test_a_late_word_does_not_open_again_what_is_over(cluster: Cluster) -> None:
    """AbortRestore that comes once more, after the attempt has been cleaned up."""
    cluster.ready()
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    with channel:
        stub.AbortRestore(pb.AbortRestoreRequest(migration=cluster.ref()), timeout=TIMEOUT)
    assert cluster.b.steps() == ["Aborted"]
