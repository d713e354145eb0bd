"""A checkpoint gives the pod back, whatever happens, and never leaves half an archive."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from fakes.cluster import MIGRATION, POD, Cluster
from fakes.host import IP
from godwit_agent.app.checkpointing import Checkpointer, Plan
from godwit_agent.app.model import Migration, PeerNode, Pod
from godwit_agent.archive import contents
from godwit_agent.archive.contents import Entry
from godwit_agent.hostops.checkpoints.archives import Directory
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container
from godwit_api.errors import Aborted, GodwitError, Rejected
from godwit_api.reasons import Reason

KEY = bytes(32)
WHO = Migration(MIGRATION, 1, "ns", "save")
WHOM = Pod("ns", "redis-0", POD, IP)


class MemorySpool:
    """Counts what comes, keeps nothing."""

    bytes_sent = 0
    takes_shared = False
    usable = True
    failure: Exception | None = None

    def _take(self, *_: object) -> None:
        self.bytes_sent += 1

    limit = hurry = pages = zero = image = file = packet = flush = sync = close = abort = _take

    def entries(self, container: Container) -> Iterator[Entry]:
        yield contents.whole("checkpoint/core-1.img", b"registers")
        if self.failure:
            raise self.failure


class Scene:
    """Node ``a`` with its pod, and one checkpointer on it."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.world = cluster.world
        process = cluster.a.process
        assert process
        agent = process.agent
        self.spool = MemorySpool()
        self.archives = Directory(Layout(host_pid=os.getpid()), str(directory))
        self.checkpoints = Checkpointer(
            host=cluster.a.fake.host(),
            sessions=agent.source.sessions,
            guards=agent._guards,
            spool=lambda *_: self.spool,  # type: ignore[arg-type, return-value]
            here=PeerNode("a", cluster.a.address, 1, 2),
        )

    def take(self, *, leave_running: bool = True) -> None:
        plan = Plan(self.archives, "one", KEY, leave_running, {"kind": "Pod"})
        self.checkpoints.run(WHO, WHOM, plan, deadline=time.monotonic() + 20, active=lambda: True)

    def at(self, name: str) -> int:
        return self.world.index(f"a.{name}")

    def assert_back(self) -> None:
        """Runs in the kubelet's cgroups, unguarded, and can move or be saved again."""
        fake = self.cluster.a.fake
        assert not fake.host().hooks.guards()
        effects = self.world.effects
        if "a.freeze" in effects:
            thawed = len(effects) - 1 - effects[::-1].index("a.thaw")
            assert thawed > self.at("freeze")
        assert not self.archives.exists("ns", "one")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    cluster = Cluster(tmp_path / "cluster")
    yield Scene(cluster, tmp_path / "archives")
    cluster.close()


def test_the_pod_runs_before_its_archive_is_written(scene: Scene) -> None:
    scene.take()
    order = ["guard_files", "hold_syns", "freeze", "drop", "dumped", "images", "reject", "thaw"]
    assert sorted(order, key=scene.at) == order
    assert scene.at("lift") > scene.at("thaw")
    with scene.archives.read("ns", "one") as file:
        about = contents.verify(file, KEY)
    assert about["uid"] == MIGRATION
    assert about["manifest"] == {"kind": "Pod"}
    assert not scene.cluster.a.fake.host().hooks.guards()
    assert "a.kill" not in scene.world.effects


def test_a_repeated_call_finds_its_own_archive(scene: Scene) -> None:
    scene.take()
    before = scene.world.effects.count("a.freeze")
    scene.take()
    assert scene.world.effects.count("a.freeze") == before


def test_a_call_that_has_waited_for_another_finds_its_archive(scene: Scene) -> None:
    """The operator was restarted, and asks again while the first call packs."""
    packing, go_on = threading.Event(), threading.Event()

    def entries(container: Container) -> Iterator[Entry]:
        packing.set()
        assert go_on.wait(20)
        yield contents.whole("checkpoint/core-1.img", b"registers")

    scene.spool.entries = entries  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as workers:
        first = workers.submit(scene.take)
        assert packing.wait(20)
        second = workers.submit(scene.take)
        assert not wait([second], timeout=0.3).done
        go_on.set()
        first.result()
        second.result()
    assert scene.world.effects.count("a.freeze") == 1


def test_another_archive_is_never_replaced(scene: Scene) -> None:
    draft = scene.archives.begin("ns", "one", 0)
    contents.write(draft, KEY, [], {"uid": "another"})
    draft.commit()
    with pytest.raises(Rejected) as refused:
        scene.take()
    assert refused.value.reason is Reason.ARCHIVE_EXISTS
    assert "a.guard_files" not in scene.world.effects


@pytest.mark.parametrize("leave_running", [True, False])
@pytest.mark.parametrize(
    "effect",
    [
        *("round", "guard_files", "cgroup_guard", "prepare_dump", "hold_syns", "freeze"),
        *("drop", "dump", "dumped", "final_memory", "final_files", "images"),
    ],
)
def test_a_failure_gives_the_pod_back(scene: Scene, effect: str, leave_running: bool) -> None:
    scene.world.fail[f"a.{effect}"] = Aborted(Reason.DUMP_FAILED, "as told")
    with pytest.raises(GodwitError):
        scene.take(leave_running=leave_running)
    scene.assert_back()


@pytest.mark.parametrize("leave_running", [True, False])
def test_a_disk_that_is_full_costs_the_archive_only(scene: Scene, leave_running: bool) -> None:
    scene.spool.failure = OSError(28, "No space left on device")
    with pytest.raises(GodwitError):
        scene.take(leave_running=leave_running)
    scene.assert_back()


def test_a_pod_that_stops_never_runs_again(scene: Scene) -> None:
    scene.take(leave_running=False)
    frozen = scene.at("freeze")
    assert "a.thaw" not in scene.world.effects[frozen:]
    assert scene.archives.exists("ns", "one")
    assert scene.cluster.a.fake.host().hooks.guards()
    scene.checkpoints.release(WHO, WHOM)
    assert "a.kill" in scene.world.effects[frozen:]
    assert not scene.cluster.a.fake.host().hooks.guards()
