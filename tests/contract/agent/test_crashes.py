"""An agent process ends at any moment of a switch: one copy runs in the end, and only one.

A crash is an effect that never returns; a new process is started on the same
node (its journal, its frozen cgroup) while the old one hangs in it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fakes.cluster import Cluster, Node
from godwit_api.errors import Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.wire import error_of


class Crash:
    """An effect at which its process ends."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.over = threading.Event()

    def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            self.over.wait(30)
            raise OSError("this process has ended")


@pytest.fixture
def crash() -> Iterator[Crash]:
    crash = Crash()
    yield crash
    crash.over.set()


@pytest.fixture
def cluster(tmp_path: Path, crash: Crash) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    crash.over.set()
    made.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def crash_at(cluster: Cluster, effect: str, crash: Crash) -> Future[pb.SwitchResponse]:
    """Switches until ``effect``, ends that node's process there, and starts another."""
    cluster.ready()
    cluster.world.fail[effect] = crash
    pool = ThreadPoolExecutor(1)
    call = pool.submit(cluster.switch, timeout=10.0, freeze_timeout_ms=3000)
    pool.shutdown(wait=False)
    assert crash.reached.wait(10)
    node: Node = cluster.a if effect.startswith("a.") else cluster.b
    node.stop()
    node.start()
    return call


@pytest.mark.parametrize(
    "effect",
    ["a.hold_syns", "a.freeze", "a.drop", "a.dump", "a.dumped", "a.final_memory", "a.images"],
)
def test_a_source_that_had_not_decided_runs_on(cluster: Cluster, crash: Crash, effect: str) -> None:
    crash_at(cluster, effect, crash)
    assert cluster.a.steps() == ["Thawed"]
    assert not cluster.a.fake.frozen_ids
    assert cluster.world.effects[-20:].count("a.recover_dump") == 1
    assert not cluster.b.fake.running
    got = cluster.switch()
    assert not got.committed
    eventually(lambda: cluster.b.steps() == ["Refused"])
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()


@pytest.mark.parametrize("effect", ["a.route_via", "a.hold_address", "a.finish_dump", "a.kill"])
def test_a_source_that_had_decided_goes_on(cluster: Cluster, crash: Crash, effect: str) -> None:
    crash_at(cluster, effect, crash)
    got = cluster.switch()
    assert got.committed
    assert cluster.b.fake.running
    assert "a.thaw" not in cluster.world.effects
    cluster.finish()
    assert cluster.a.fake.killed
    assert cluster.world.effects.count("b.resume") == 1


@pytest.mark.parametrize("effect", ["b.complete", "b.restore"])
def test_a_target_that_ends_before_the_commit_is_rolled_back(
    cluster: Cluster, crash: Crash, effect: str
) -> None:
    call = crash_at(cluster, effect, crash)
    assert not call.result(15).committed
    assert not cluster.b.fake.running
    assert not cluster.a.fake.frozen_ids
    eventually(lambda: cluster.b.steps() == ["Refused"])


@pytest.mark.parametrize("effect", ["b.route_local", "b.open_door", "b.resume"])
def test_a_target_that_ends_after_the_commit_runs_in_the_end(
    cluster: Cluster, crash: Crash, effect: str
) -> None:
    call = crash_at(cluster, effect, crash)
    # its port has changed with the process here, so the source reaches it by the next answer:
    # the new target asks the source, hears of the commit and runs
    eventually(lambda: cluster.b.fake.running)
    assert "a.thaw" not in cluster.world.effects
    assert "a.kill" not in cluster.world.effects or cluster.b.fake.running
    call.cancel()


def test_a_source_whose_target_is_silent_stays_frozen(cluster: Cluster, crash: Crash) -> None:
    cluster.ready()
    cluster.world.fail["b.route_local"] = OSError("not now")
    with pytest.raises(grpc.RpcError) as caught:
        cluster.switch(timeout=3.0)
    assert isinstance(error_of(caught.value), Retryable)
    assert "a.thaw" not in cluster.world.effects
    assert "a.kill" not in cluster.world.effects
    assert cluster.a.steps() == ["Committed"]
    cluster.world.fail.clear()
    assert cluster.switch().committed
    cluster.finish()


def test_a_commit_record_that_cannot_be_written_rolls_back(
    cluster: Cluster, crash: Crash, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.ready()
    real = os.fsync
    failures: list[str] = []

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if path.endswith("1.source") and b"Committed" in Path(path).read_bytes() and not failures:
            failures.append(path)
            raise OSError("no space")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    got = cluster.switch()
    assert failures
    assert not got.committed
    assert cluster.a.steps() == ["Thawed"]
    assert not cluster.b.fake.running


def test_a_commit_record_of_unknown_fate_leaves_everything_frozen(
    cluster: Cluster, crash: Crash, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.ready()
    real = os.fsync

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if path.endswith("1.source") and "b.restore" in cluster.world.effects:
            raise OSError("I/O error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            cluster.switch()
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert cluster.a.fake.frozen_ids
    assert not cluster.b.fake.running


def test_a_target_node_that_lost_its_copy_never_says_that_it_runs(
    cluster: Cluster, crash: Crash
) -> None:
    """Restarted between the commit and the word to run: the frozen source is the last copy."""
    cluster.ready()
    cluster.world.fail["b.route_local"] = OSError("not now")
    with pytest.raises(grpc.RpcError):
        cluster.switch(timeout=3.0)
    cluster.b.stop()
    cluster.b.fake.reboot()
    cluster.world.fail.clear()
    cluster.b.start()
    answers: list[grpc.RpcError] = []

    def told() -> bool:
        with pytest.raises(grpc.RpcError) as caught:
            cluster.switch(timeout=3.0)
        answers.append(caught.value)
        return "restarted" in str(error_of(caught.value))

    eventually(told)
    assert answers[-1].code() is grpc.StatusCode.DATA_LOSS, "a person decides"
    assert cluster.a.steps() == ["Committed"]
    assert cluster.b.steps() == ["Armed"]
    assert "a.kill" not in cluster.world.effects
    assert "a.thaw" not in cluster.world.effects
