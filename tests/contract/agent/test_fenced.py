"""The source's node is gone for good, in every moment around the restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fakes.cluster import MIGRATION, TIMEOUT, Cluster
from fakes.cluster import cluster as make_cluster
from godwit_api.errors import Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_api.wire import error_of


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from make_cluster(tmp_path)


def restore(cluster: Cluster) -> None:
    """As the source agent does it, up to the commit record that it never writes."""
    cluster.ready()
    cluster.b.fake.stores_here[MIGRATION].got.append(("image", "app", "core-1.img", b"core"))
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    with channel:
        stub.Arm(pb.ArmRequest(migration=cluster.ref()), timeout=TIMEOUT)
        stub.Restore(pb.RestoreRequest(migration=cluster.ref()), timeout=TIMEOUT)


def run_fenced(cluster: Cluster, epoch: int = 1) -> pb.RunResponse:
    return cluster.b.api.RunFenced(pb.RunRequest(migration=cluster.ref(epoch)), timeout=TIMEOUT)


def refusal(cluster: Cluster, epoch: int = 1) -> Reason:
    with pytest.raises(grpc.RpcError) as caught:
        run_fenced(cluster, epoch)
    return Reason(error_of(caught.value).reason)


def test_a_complete_copy_runs_once(cluster: Cluster) -> None:
    restore(cluster)
    cluster.a.stop()
    first = run_fenced(cluster)
    assert run_fenced(cluster).resumed_unix_ns == first.resumed_unix_ns > 0
    assert cluster.world.effects.count("b.resume") == 1
    assert cluster.b.steps()[-1] == "Resumed"
    cluster.b.api.FinishTarget(pb.FinishTargetRequest(migration=cluster.ref()), timeout=TIMEOUT)
    assert not cluster.b.fake.stores_here


def test_so_does_one_that_an_earlier_agent_process_restored(cluster: Cluster) -> None:
    restore(cluster)
    cluster.a.stop()
    cluster.b.stop()
    cluster.b.start()
    run_fenced(cluster)
    assert cluster.b.fake.running


def test_a_restart_in_the_middle_goes_on(cluster: Cluster) -> None:
    """From the record on it runs, and nobody throws it away: not even its source."""
    restore(cluster)
    cluster.a.stop()
    cluster.world.fail["b.resume"] = Retryable(Reason.INTERNAL, "killed")
    with pytest.raises(grpc.RpcError):
        run_fenced(cluster)
    assert cluster.b.steps()[-1] == "Fenced"
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    with channel, pytest.raises(grpc.RpcError) as caught:
        stub.AbortRestore(pb.AbortRestoreRequest(migration=cluster.ref()), timeout=TIMEOUT)
    assert error_of(caught.value).reason is Reason.WRONG_STEP
    cluster.b.stop()
    cluster.world.fail.clear()
    cluster.b.start()
    run_fenced(cluster)
    assert cluster.b.fake.running
    assert cluster.b.steps()[-1] == "Resumed"


def test_nothing_runs_that_was_not_restored(cluster: Cluster) -> None:
    cluster.ready()
    cluster.a.stop()
    assert refusal(cluster) is Reason.NODE_LOST
    assert "b.resume" not in cluster.world.effects


def test_a_copy_whose_source_has_thawed_never_runs(cluster: Cluster) -> None:
    restore(cluster)
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    with channel:
        stub.AbortRestore(pb.AbortRestoreRequest(migration=cluster.ref()), timeout=TIMEOUT)
    cluster.a.stop()
    assert refusal(cluster) is Reason.NODE_LOST
    assert "b.resume" not in cluster.world.effects


def test_another_epoch_is_not_heard(cluster: Cluster) -> None:
    restore(cluster)
    cluster.a.stop()
    assert refusal(cluster, epoch=2) is Reason.UNKNOWN_MIGRATION
    assert "b.resume" not in cluster.world.effects
