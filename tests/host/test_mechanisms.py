"""A process with memory and connections really moves between two nodes, or really stays.

No Kubernetes: runc containers in namespaces, the real ports, and a sink that
hands every byte straight to the target's store.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.copies import HostCopies
from godwit_agent.hostops.criu.dump import HostDumps, HostGatedDump
from godwit_agent.hostops.criu.restore import HostRestores
from godwit_agent.hostops.hooks import HookFiles
from godwit_agent.hostops.model import Moment, PodState
from godwit_agent.hostops.net.network import HostNetworks, HostPodNetwork
from godwit_agent.hostops.pages.memory import HostSourceMemory
from godwit_agent.hostops.pods import HostPods
from godwit_agent.hostops.store import HostStores, HostTargetStore
from godwit_api.errors import Aborted, Retryable
from host.lab import BASE, RUNC_ROOT, Counter, Lab, Node, Pod

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/sbin/criu").exists(), reason=f"no CRIU in {BASE}"),
]

REDIS = [
    *("redis-server", "--protected-mode", "no", "--save", "", "--enable-debug-command", "yes"),
    *("--appendonly", "yes", "--auto-aof-rewrite-percentage", "0"),
]
IP = "10.98.0.5"
MB = int(os.environ.get("GODWIT_TEST_MB", "200"))


class Agent:
    """The ports of one node."""

    def __init__(self, node: Node) -> None:
        layout = node.layout
        self.hooks = HookFiles(layout)
        self.pods = HostPods(layout)
        self.cgroups = HostCgroups(layout)
        self.dumps = HostDumps(layout, self.hooks)
        self.stores = HostStores(layout)
        self.restores = HostRestores(layout, self.hooks)
        self.networks = HostNetworks(layout)
        self.copies = HostCopies(layout)

    def network(self, pod: PodState) -> HostPodNetwork:
        assert pod.link
        return self.networks.open(
            pod.sandbox.netns,
            pod.link.interface,
            pod.link.host_interface,
            pod.link.pod_mac,
            pod.link.host_mac,
        )


class Marks:
    """Named parts of a freeze, printed at its end."""

    def __init__(self) -> None:
        self._last = self._begin = time.monotonic()
        self._parts: list[str] = []

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self._parts.append(f"{name} {1000 * (now - self._last):.1f}")
        self._last = now

    def __str__(self) -> str:
        return f"{1000 * (self._last - self._begin):.1f} ms: " + ", ".join(self._parts)


def start_redis(scene: Lab, node: Node) -> tuple[Pod, PodState]:
    pod = scene.sandbox(node, IP)
    scene.start(pod, REDIS)
    node.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    scene.route(IP, node)
    counter = None
    for _ in range(100):
        try:
            counter = Counter(scene, IP)
            break
        except OSError:
            time.sleep(0.05)
    assert counter
    counter.stop()
    assert counter.error is None
    filler = Counter(scene, IP)
    filler.stop()
    node.run(
        *("nsenter", f"--net=/proc/{pod.pause.pid}/ns/net"),
        *("redis-cli", "debug", "populate", str(MB * 1000), "key", "1000"),
    )
    node.run("nsenter", f"--net=/proc/{pod.pause.pid}/ns/net", "redis-cli", "del", "n")
    return pod, HostPods(node.layout).find(pod.uid)


def redis(node: Node, pod: Pod, *words: str) -> str:
    return node.run("nsenter", f"--net=/proc/{pod.pause.pid}/ns/net", "redis-cli", *words).strip()


def write_files(state: PodState) -> None:
    """What a container does to its files: own ones, links, a hidden one of its image."""
    root = Path(f"/proc/{state.containers[0].init_pid}/root")
    (root / "srv/own").mkdir()
    (root / "srv/own/text").write_text("first")
    os.chown(root / "srv/own/text", 33, 44)
    (root / "srv/own/text").chmod(0o4751)
    (root / "srv/own/link").symlink_to("/etc/passwd")
    os.link(root / "srv/own/text", root / "srv/own/twin")
    with (root / "srv/own/sparse").open("wb") as file:
        file.truncate(50 << 20)
        file.seek(30 << 20)
        file.write(b"here")
    (root / "etc/debian_version").unlink()
    (root / "dev/shm/shared").write_text("in memory")


def change_files(state: PodState) -> None:
    root = Path(f"/proc/{state.containers[0].init_pid}/root")
    (root / "srv/own/late").write_text("later")
    (root / "srv/own/link").unlink()
    with (root / "srv/own/sparse").open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"there")


def check_files(pid: int) -> None:
    root = Path(f"/proc/{pid}/root")
    text = (root / "srv/own/text").stat()
    assert (text.st_uid, text.st_gid, text.st_mode & 0o7777, text.st_nlink) == (33, 44, 0o4751, 2)
    assert (root / "srv/own/late").read_text() == "later"
    assert not (root / "srv/own/link").is_symlink()
    assert not (root / "etc/debian_version").exists()
    assert (root / "dev/shm/shared").read_text() == "in memory"
    with (root / "srv/own/sparse").open("rb") as file:
        about = os.fstat(file.fileno())
        assert (about.st_size, about.st_blocks * 512 < 4 << 20) == (50 << 20, True)
        assert os.pread(file.fileno(), 4, 30 << 20) == b"here"
        assert os.pread(file.fileno(), 5, 40 << 20) == b"there"


def copy(memory: HostSourceMemory, store: HostTargetStore, rounds: int = 4) -> None:
    for container, name, content in memory.bootstrap():
        store.image(container, name, 0, len(content), memoryview(content))
    for number in range(rounds):
        stats = memory.round(store)
        print(f"round {number}: {stats}")
        time.sleep(0.2)


@pytest.mark.parametrize("huge_pages", ["", "always"], indirect=True)
def test_redis_moves_with_its_connection(scene: Lab, huge_pages: str) -> None:
    """Counter exact, same connection, memory complete, source gone. Also where huge pages are given
    unasked: a page that is restored must not bring its neighbours, empty."""
    source, target = Agent(scene.a), Agent(scene.b)
    pod, state = start_redis(scene, scene.a)
    container, uid = state.containers[0], str(uuid.uuid4())
    write_files(state)
    digest = redis(scene.a, pod, "debug", "digest")
    counter = Counter(scene, IP)

    source.stores.create_source(uid)
    store = target.stores.create_target(uid, ("main",), MB << 20)
    memory, files = source.copies.memory(state), source.copies.files(state)
    print("files", files.round(store))
    change_files(state)
    copy(memory, store)

    source.cgroups.guard(container)
    successor = scene.sandbox(scene.b, IP)
    target.hooks.expect(successor.uid, uid, 1, (IP,), store.slots())
    scene.create(successor, REDIS)
    target.restores.wait_waiting(store.slots()["main"], 10)
    arrived = target.pods.find(successor.uid)
    store.bind(arrived)
    print("files", files.round(store))
    store.start_daemons()
    here, there = source.network(state), target.network(arrived)
    there.close_door()
    dump = source.dumps.prepare(container, uid)
    assert isinstance(dump, HostGatedDump)
    dump.wait_waiting(10)
    memory.round(store)
    time.sleep(0.3)
    counter.worst_ms = 0

    held_from = here.hold_syns()
    time.sleep(0.02)
    marks = Marks()
    frozen = source.cgroups.freeze([container.id], 5)
    marks("freeze")
    here.drop()
    marks("drop")
    dump.open_gate()
    errors: list[Exception] = []

    def last() -> None:
        try:
            print("final", memory.final(store))
            print("files", files.final(store))
        except Exception as error:
            errors.append(error)

    helper = threading.Thread(target=last)
    helper.start()
    dump.wait_dumped(10)
    marks("dump")
    helper.join()
    assert not errors
    marks("pages")
    if keep := os.environ.get("GODWIT_TEST_LOGS"):
        shutil.copytree(dump._path / "work", keep, dirs_exist_ok=True)
    for name, content in dump.images(moving=True):
        store.image("main", name, 0, len(content), memoryview(content))
    marks("images")
    totals = store.complete()
    marks("complete")
    told = target.pods.find(successor.uid).containers[0].init_pid
    restored = target.restores.restore(store.slots()["main"], 10)
    marks("restore")
    assert restored.init_pid == told  # what the runtime has taken for the container all the time
    # the commit record would be written here
    scene.b.run("ip", "route", "add", f"{IP}/32", "dev", successor.host_interface)
    scene.a.run("ip", "route", "replace", f"{IP}/32", "via", scene.b.address)
    marks("routes")
    there.open_door()
    target.restores.resume([restored])
    marks("resume")
    if keep:
        log = scene.b.layout.local(store.slots()["main"].work) / "restore.log"
        shutil.copy(log, keep)
    packets = here.held(syn_since_ns=held_from, since=Moment(frozen, frozen))
    print("replayed", there.inject(packets))
    marks("replay")
    print(marks)
    time.sleep(0.5)
    begin = time.monotonic()
    dump.finish()
    source.cgroups.kill([container.id])
    print(f"finish {1000 * (time.monotonic() - begin):.0f} ms")
    time.sleep(0.5)
    print(f"totals {totals}; worst reply {counter.worst_ms:.1f} ms of {counter.replies}")
    counter.stop()
    assert counter.error is None
    assert store.drained(60)
    redis(scene.b, successor, "del", "n")
    assert redis(scene.b, successor, "debug", "digest") == digest
    check_files(restored.init_pid)
    memory.close()
    files.close()
    here.close()
    there.close()
    store.destroy()
    target.stores.destroy(uid)
    source.stores.destroy(uid)
    assert container.id not in source.cgroups.list()


def test_redis_stays_after_a_dump_that_is_rejected(scene: Lab) -> None:
    """The connection lives and the gap is the freeze, not a retransmission timeout."""
    source = Agent(scene.a)
    _, state = start_redis(scene, scene.a)
    container, uid = state.containers[0], str(uuid.uuid4())
    counter = Counter(scene, IP)

    source.stores.create_source(uid)
    source.cgroups.guard(container)
    here = source.network(state)
    dump = source.dumps.prepare(container, uid)
    dump.wait_waiting(10)
    time.sleep(0.3)
    counter.worst_ms = 0

    held_from = here.hold_syns()
    time.sleep(0.02)
    marks = Marks()
    source.cgroups.freeze([container.id], 5)
    dropped = here.drop()
    dump.open_gate()
    dump.wait_dumped(10)
    marks("dump")
    time.sleep(0.1)
    dump.reject()
    marks("reject")
    assert source.cgroups.frozen(container.id)
    source.cgroups.thaw([container.id])
    marks("thaw")
    lifted = here.lift()
    here.inject(here.held(syn_since_ns=held_from, since=dropped, until=lifted))
    marks("replay")
    print(marks)
    time.sleep(0.5)
    print(f"worst reply {counter.worst_ms:.1f} ms of {counter.replies}")
    counter.stop()
    assert counter.error is None
    source.cgroups.unguard(container)
    assert container.id not in source.cgroups.list()
    here.close()
    source.stores.destroy(uid)


@pytest.mark.parametrize("dumped", [False, True], ids=["at the gate", "dumped"])
def test_a_restarted_agent_lets_the_source_go_on(scene: Lab, dumped: bool) -> None:
    """Nothing but the files and the processes are left of the agent that began."""
    former = Agent(scene.a)
    _, state = start_redis(scene, scene.a)
    container, uid = state.containers[0], str(uuid.uuid4())
    counter = Counter(scene, IP)
    former.stores.create_source(uid)
    former.cgroups.guard(container)
    dump = former.dumps.prepare(container, uid)
    dump.wait_waiting(10)
    former.cgroups.freeze([container.id], 5)
    here = former.network(state)
    here.drop()
    if dumped:
        dump.open_gate()
        dump.wait_dumped(10)

    agent = Agent(scene.a)
    again = agent.pods.find(state.uid)
    assert again.containers[0].id == container.id
    agent.dumps.recover(again.containers[0], uid)
    assert dump._process.wait(5) != 0
    assert agent.cgroups.frozen(container.id)
    agent.cgroups.thaw([container.id])
    agent.networks.reset(again.sandbox.netns)
    agent.cgroups.unguard(again.containers[0])
    agent.stores.destroy(uid)
    assert agent.stores.list() == ()
    replies = counter.replies
    time.sleep(1.5)
    counter.stop()
    assert counter.error is None
    assert counter.replies > replies
    here.close()
    dump._clean()


def expected(scene: Lab) -> tuple[Agent, HostTargetStore, Pod, str]:
    """The sandbox of a successor on the second node, whose container is yet to be created; with
    the migration's UID."""
    agent, uid = Agent(scene.b), str(uuid.uuid4())
    store = agent.stores.create_target(uid, ("main",), 1 << 20)
    images = scene.b.layout.local(store.slots()["main"].images)
    (images / "descriptors.json").write_text("[]")
    successor = scene.sandbox(scene.b, IP)
    agent.hooks.expect(successor.uid, uid, 1, (IP,), store.slots())
    return agent, store, successor, uid


def test_a_successor_is_refused_at_its_gate(scene: Lab) -> None:
    """The runtime has a process from the beginning; it ends, and the hook says why."""
    agent, store, successor, uid = expected(scene)
    slot = store.slots()["main"]
    create = scene.create(successor, REDIS)
    assert agent.restores.wait_waiting(slot, 10) == successor.container_id
    assert create.wait(10) == 0
    pid = agent.pods.find(successor.uid).containers[0].init_pid
    assert successor.container_id in procs.read(pid, "cgroup")
    placeholder = os.pidfd_open(pid)
    agent.restores.abort(slot)
    ended, _, _ = select.select([placeholder], [], [], 10)
    os.close(placeholder)
    assert ended
    assert agent.restores.find(slot) is None
    result = scene.b.layout.local(slot.directory) / "result.json"
    assert agent.hooks.wait(lambda: result.exists() or None, 10)
    with pytest.raises(Aborted):
        agent.restores.wait_waiting(slot, 1)
    store.destroy()
    agent.stores.destroy(uid)


def test_a_successor_is_not_there_before_the_runtime_has_started_it(scene: Lab) -> None:
    """Until then a kubelet that is restarted makes the runtime give it up."""
    agent, store, successor, uid = expected(scene)
    slot = store.slots()["main"]
    create = scene.create(successor, REDIS, start=False)
    assert create.wait(20) == 0
    assert (scene.b.layout.local(slot.directory) / "waiting").exists()
    with pytest.raises(Retryable):
        agent.restores.wait_waiting(slot, 0.5)
    runtime = ("/opt/godwit/bin/godwit-runc", "--root", RUNC_ROOT)
    scene.b.run(*runtime, "start", successor.container_id)
    assert agent.restores.wait_waiting(slot, 10) == successor.container_id
    agent.restores.abort(slot)
    store.destroy()
    agent.stores.destroy(uid)
