"""Shared memory of every kind arrives, whoever writes to it and however, while it is copied."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops import filerecords, procs
from godwit_agent.hostops.filerecords import Kind
from godwit_agent.hostops.model import Tracking
from godwit_agent.hostops.pages import sharedobjects
from godwit_agent.hostops.pages.memory import HostSourceMemory, deliver
from godwit_agent.hostops.pages.sharedmemory import SHARED, SharedMemory
from godwit_agent.hostops.pages.sharedstore import SharedStore
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted
from host.lab import BASE, ROOT, Lab, injector, needs_tracking
from host.test_changing_memory import said, wait_for_passes
from host.test_kernel_objects import IP, move
from host.test_mechanisms import Agent
from host.test_mechanisms_memory import pod_of, stop

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not BASE.exists(), reason=f"no {BASE}"),
]


@pytest.fixture(scope="module")
def sharer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharer")
    source = ROOT / "lab/sharer/sharer.c"
    argv = ["gcc", "-O2", "-static", "-o", str(path / "sharer"), str(source)]
    subprocess.run(argv, check=True)
    return path


class Sink:
    """A target's store, without the network."""

    def __init__(self, directory: Path) -> None:
        self.store = SharedStore(directory)

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self.store.write(vpid, vaddr, data)

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self.store.zero(vpid, vaddr, length)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        record = filerecords.decode(header)
        if record.kind is Kind.SHARED:
            self.store.announce(record, body)
        else:
            self.store.populated(record.number, record.size, body)

    def content(self, number: int) -> tuple[int, int]:
        """(descriptor, size) of what a restore would get."""
        one = next(one for one in self.store._objects.values() if one.about.number == number)
        return one.fd, os.fstat(one.fd).st_size


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    made = Sink(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def process(sharer: Path, tmp_path: Path) -> Iterator[int]:
    """In an IPC namespace of its own, so that its segments end with it."""
    (tmp_path / "data").mkdir()
    argv = ["unshare", "--ipc", str(sharer / "sharer"), str(tmp_path / "data")]
    child = subprocess.Popen(argv)
    deadline = time.monotonic() + 20
    while not (tmp_path / "data/passes").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield child.pid
    for pid in reversed(procs.tree(child.pid)):
        os.kill(pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "data/wrong").exists(), (tmp_path / "data/wrong").read_text()


def compare(sink: Sink, pids: tuple[int, ...]) -> int:
    """Pages compared; the processes stand still.

    What was attached in the last moment only, as the sharer does to look at its detached segment,
    has not been announced: CRIU takes it along.
    """
    count, known = 0, {one.about.number for one in sink.store._objects.values()}
    for found in sharedobjects.of(pids):
        if found.number not in known:
            continue
        here, (there, size) = os.open(found.path, os.O_RDONLY), sink.content(found.number)
        assert os.fstat(here).st_size == size, found
        for at in range(0, size, PAGE):
            assert os.pread(here, PAGE, at) == os.pread(there, PAGE, at), f"{found}, {at:#x}"
            count += 1
        assert os.fstat(here).st_blocks >= os.fstat(there).st_blocks, "holes stay holes"
        os.close(here)
    return count


def test_every_page_arrives(process: int, sink: Sink) -> None:
    memory, pids = SharedMemory(deliver), procs.tree(process)
    assert memory.announce("main", pids, sink)
    sent = []
    for _ in range(6):
        memory.announce("main", pids, sink)
        sent.append(memory.round("main", sink, lambda: False).copied)
        time.sleep(0.2)
    stop(pids, on=True)
    last = memory.final("main", sink)
    assert sink.store.complete_all() > 4 << 20
    assert compare(sink, pids) > 5 * 1024
    assert len(memory.taken("main")) == 6
    assert memory.carried_bytes() == 4 << 20, "the segment that nobody has attached"
    assert memory.fill_us() > 0, "the one that is attached"
    assert last.copied < sent[0] / 4
    stop(pids, on=False)
    memory.close()


class SharedOnly(Sink):
    """Takes what is private as little as the freeze of a post-copy that may send nothing of it."""

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        if vpid & SHARED:
            super().pages(container, vpid, vaddr, data)

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        if vpid & SHARED:
            super().zero(container, vpid, vaddr, length)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        record = filerecords.decode(header)
        if record.kind is Kind.SHARED or record.number & SHARED:
            super().file(container, header, body)


@needs_tracking
def test_a_post_copy_withholds_none_of_it_and_knows_how_much_there_is(
    process: int, tmp_path: Path
) -> None:
    sink = SharedOnly(tmp_path)
    memory = HostSourceMemory(pod_of(process), Tracking.USERFAULTFD, injector())
    pids = procs.tree(process)
    memory.announce(sink)
    for _ in range(3):
        written = memory.round(sink)
        memory.announce(sink)
        time.sleep(0.2)
    assert 0 < written.bound_bytes <= written.dirty_bytes
    stop(pids, on=True)
    last = memory.final(sink, allowance=0)
    assert last.copied_bytes == last.bound_bytes > 0
    assert last.withheld_bytes == last.dirty_bytes - last.bound_bytes > 0
    sink.store.complete_all()
    assert compare(sink, pids) > 5 * 1024
    stop(pids, on=False)
    memory.close()
    sink.store.close()


class Holders:
    """Processes that have memfds open, and do nothing."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._fds: list[int] = []

    def make(self, name: str, content: bytes) -> tuple[int, int]:
        """(pid, descriptor of ours)."""
        fd = os.memfd_create(name)
        os.pwrite(fd, content, 0)
        self._fds.append(fd)
        self._children.append(subprocess.Popen(["sleep", "1000"], pass_fds=[fd]))
        return self._children[-1].pid, fd

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def holders() -> Iterator[Holders]:
    made = Holders()
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(deliver)
    yield made
    made.close()


def copy(memory: SharedMemory, pids: tuple[int, ...], sink: Sink) -> None:
    memory.announce("main", pids, sink)
    memory.round("main", sink, lambda: False)


def test_what_nobody_has_any_more_is_forgotten(
    sink: Sink, holders: Holders, memory: SharedMemory
) -> None:
    (one, gone), (other, _) = holders.make("short", b"x" * PAGE), holders.make("long", b"y" * PAGE)
    copy(memory, (one, other), sink)
    assert len(memory.taken("main")) == 2
    assert memory.announce("main", (other,), sink) is False
    about = os.fstat(gone)
    assert (about.st_dev, about.st_ino) not in memory.taken("main")
    memory.final("main", sink)
    assert sink.store.complete_all() == PAGE
    assert compare(sink, (other,)) == 1


def test_a_copy_that_starts_over_numbers_anew(sink: Sink, holders: Holders) -> None:
    pids = tuple(holders.make(name, name.encode() * PAGE)[0] for name in ("one", "two", "three"))
    for some in (pids[:2], pids[1:], pids):
        memory = SharedMemory(deliver)
        copy(memory, some, sink)
        memory.close()
    memory = SharedMemory(deliver)
    copy(memory, pids[1:], sink)
    memory.final("main", sink)
    sink.store.complete_all()
    assert compare(sink, pids[1:]) == 3 + 5
    memory.close()


def test_a_page_that_has_not_come_is_missed(
    sink: Sink, holders: Holders, memory: SharedMemory
) -> None:
    pid, _ = holders.make("whole", b"x" * 3 * PAGE)

    class Lossy(Sink):
        def __init__(self) -> None:
            self.store = sink.store

        def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
            super().pages(container, vpid, vaddr, data[:PAGE])

    copy(memory, (pid,), Lossy())
    memory.final("main", sink)
    with pytest.raises(Aborted, match="a page"):
        sink.store.complete_all()


def test_memory_that_is_cut_off_is_read_no_further(
    sink: Sink, holders: Holders, memory: SharedMemory
) -> None:
    pid, fd = holders.make("cut", b"x" * 64 * PAGE)
    copy(memory, (pid,), sink)
    (one,) = memory._objects.values()
    os.ftruncate(fd, PAGE)
    assert one.tables[0].changed(one.address, 0, 64) is None
    assert one.tables[0].changed(one.address, 0, 1) == []
    memory.final("main", sink)
    assert sink.store.complete_all() == PAGE
    assert compare(sink, (pid,)) == 1


def test_it_is_counted_where_a_process_of_that_cgroup_would_be(
    sink: Sink, holders: Holders, memory: SharedMemory
) -> None:
    pid, _ = holders.make("counted", os.urandom(1 << 20) + bytes(1 << 20) + os.urandom(1 << 20))
    copy(memory, (pid,), sink)
    top = Path("/sys/fs/cgroup/memory")
    counter = "memory.usage_in_bytes" if top.is_dir() else "memory.current"
    place = (top if top.is_dir() else top.parent) / f"godwit-test-{os.getpid()}"
    place.mkdir()
    try:
        sink.store.charge(place, 1 << 30)
        assert 2 << 20 <= int((place / counter).read_text()) < 4 << 20
        memory.round("main", sink, lambda: False)
        memory.final("main", sink)
        sink.store.complete_all()
        assert compare(sink, (pid,)) == 768
    finally:
        sink.store.close()
        place.rmdir()


def test_two_of_one_number_are_left_to_criu() -> None:
    def found(number: int, *, sysv: bool) -> sharedobjects.Found:
        return sharedobjects.Found(1, number, "/nowhere", "name", sysv)

    twins = found(1, sysv=False), found(1, sysv=True)
    alone, large = found(2, sysv=True), found(1 << 32, sysv=False)
    assert sharedobjects.without_twins((*twins, alone, large)) == (alone,)


def test_it_moves_there_and_back(scene: Lab, sharer: Path) -> None:
    pod = scene.sandbox(scene.a, IP)
    scene.start(pod, ["/lab/sharer", "/data"], sharer)
    scene.a.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    state = Agent(scene.a).pods.find(pod.uid)
    wait_for_passes(state.containers[0].init_pid, 2)
    for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
        _, state = move(scene, state, here, there)
        init = state.containers[0].init_pid
        wait_for_passes(init, 3)
        assert not said(init, "wrong")
        names = {one.name for one in sharedobjects.of(procs.tree(init))}
        assert {"with a descriptor", "closed", "sealed", "elastic"} <= names
