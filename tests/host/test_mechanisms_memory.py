"""Tracking finds every page a living process writes, and leaves the process as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops import filerecords, procs
from godwit_agent.hostops.model import Container, HostPath, PodState, Sandbox, Tracking
from godwit_agent.hostops.pages import pagescan
from godwit_agent.hostops.pages.memory import HostSourceMemory
from godwit_agent.hostops.pages.pagescan import populated
from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.memory.pageset import PAGE
from host.lab import injector, needs_tracking

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

# Threads in system calls of every restartable kind, a thread that writes, forks, new mappings.
PROGRAM = """
import mmap, os, random, select, signal, socket, sys, threading, time
big = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(big), 4096): big[at:at + 8] = at.to_bytes(8, "little")
errors = []
def sleeper():
    while True:
        begin = time.monotonic(); time.sleep(0.3)
        if not 0.29 < time.monotonic() - begin < 3: errors.append("sleep")
def poller():
    reader, writer = os.pipe()
    while True:
        if select.poll().poll(200) or select.select([reader], [], [], 0.2)[0]: errors.append("poll")
def echo():
    one, two = socket.socketpair()
    def other():
        while True: two.sendall(two.recv(100))
    threading.Thread(target=other, daemon=True).start()
    while True:
        one.sendall(b"x" * 50)
        if one.recv(100, socket.MSG_WAITALL and 0) == b"": errors.append("echo")
def dirty():
    maps = []
    while True:
        at = random.randrange(len(big) // 4096) * 4096
        big[at + 16:at + 24] = random.randbytes(8)
        if random.random() < 0.01:
            maps.append(mmap.mmap(-1, 65536, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            maps[-1][:8] = b"new page"
            del maps[:-8]
        time.sleep(0.0002)
for work in (sleeper, poller, echo, dirty): threading.Thread(target=work, daemon=True).start()
if "fork" in sys.argv:
    time.sleep(1.0)
    if os.fork() == 0:
        mine = bytearray(os.urandom(1 << 20))
        time.sleep(1000)
def report(*_): print("errors", errors, flush=True)
signal.signal(signal.SIGUSR1, report)
print("ready", flush=True)
while True: time.sleep(0.05)  # a signal may be taken by another thread
"""


class Sink:
    """A target's store, without the network."""

    def __init__(self, directory: Path) -> None:
        self.store = PageStore(directory)
        self.directory = directory

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self.store.write(vpid, vaddr, data)

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self.store.zero(vpid, vaddr, length)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        record = filerecords.decode(header)
        assert record.kind is filerecords.Kind.POPULATED
        self.store.populated(record.number, record.size, body)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        made = Sink(Path(name))
        yield made
        made.store.close()


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PROGRAM, *getattr(request, "param", [])]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    yield child
    for pid in reversed(procs.tree(child.pid)):
        os.kill(pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def pod_of(pid: int) -> PodState:
    path = HostPath("/nowhere")
    container = Container("c", "main", pid, path, path, path, None, {}, (), ())
    return PodState("u", "ns", "n", Sandbox("s", 1, path, 1), (container,), None)


def stop(pids: tuple[int, ...], *, on: bool) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)
    while on and any(procs.states(pid) - {"T"} for pid in pids):
        time.sleep(0.001)


def compare(sink: Sink, pid: int) -> int:
    """Pages compared; the process stands still."""
    count = 0
    vpid = procs.vpid(pid)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    store = os.open(sink.directory / f"pages-{vpid}.img", os.O_RDONLY)
    for area in (item for item in procs.mappings(pid) if item.private_anonymous):
        for start, end in populated(pagemap, area.start, area.end):
            for at in range(start, end, PAGE):
                there = os.pread(store, PAGE, at).ljust(PAGE, b"\0")
                assert os.pread(memory, PAGE, at) == there, f"page {at:#x} of {area}"
                count += 1
    for fd in (pagemap, memory, store):
        os.close(fd)
    return count


@pytest.mark.parametrize("process", [[], ["fork"]], indirect=True, ids=["threads", "fork"])
@pytest.mark.parametrize(
    "kind", [pytest.param(Tracking.USERFAULTFD, marks=needs_tracking), Tracking.PAGE_HASH]
)
def test_every_page_arrives(process: subprocess.Popen[str], sink: Sink, kind: Tracking) -> None:
    memory = HostSourceMemory(pod_of(process.pid), kind, injector())
    rounds = []
    for _ in range(6):
        rounds.append(memory.round(sink))
        time.sleep(0.25)
    pids = procs.tree(process.pid)
    stop(pids, on=True)
    last = memory.final(sink)
    assert sum(compare(sink, pid) for pid in pids) > 8192
    assert last.copied_bytes < rounds[0].copied_bytes / 4
    stop(pids, on=False)
    memory.close()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout
    assert process.stdout.readline() == "errors []\n"


@needs_tracking
def test_memory_that_is_only_reserved_costs_nothing(sink: Sink, tmp_path: Path) -> None:
    """MariaDB reserves 8 TiB, and is hashed: its page map has 16 GiB of entries."""
    program = (
        "import mmap, os, time; flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000\n"
        "mine = mmap.mmap(-1, 8 << 40, flags)\n"  # MAP_NORESERVE
        "for at in (0, 3 << 40, (8 << 40) - 4096): mine[at:at + 4] = b'here'\n"
        f"os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR | os.O_DIRECT)\n"
        "print('ready', flush=True); time.sleep(1000)"
    )
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            memory = HostSourceMemory(pod_of(child.pid), Tracking.USERFAULTFD, injector())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pagescan, "populated", pytest.fail)
                memory.round(sink)
                stop((child.pid,), on=True)
                last = memory.final(sink)
            assert last.copied_bytes == 0
            assert last.freeze_us > 0  # all of it is read again, and a prediction knows
            area = max(procs.mappings(child.pid), key=lambda one: one.end - one.start)
            store = os.open(sink.directory / f"pages-{procs.vpid(child.pid)}.img", os.O_RDONLY)
            for at in (area.start, area.start + (3 << 40), area.end - PAGE):
                assert os.pread(store, 4, at) == b"here"
            os.close(store)
            memory.close()
        finally:
            child.kill()


@needs_tracking
def test_nothing_is_left_in_the_process(process: subprocess.Popen[str], sink: Sink) -> None:
    before = sorted(target for _, target in procs.descriptors(process.pid))
    memory = HostSourceMemory(pod_of(process.pid), Tracking.USERFAULTFD, injector())
    memory.round(sink)
    assert procs.status(process.pid)["TracerPid"] == "0"
    memory.close()
    after = sorted(target for _, target in procs.descriptors(process.pid))
    assert after == before


@needs_tracking
def test_a_debugged_process_is_hashed_instead(process: subprocess.Popen[str], sink: Sink) -> None:
    tracer = (
        subprocess.Popen(
            ["strace", "-qq", "-o", "/dev/null", "-p", str(process.pid)], stderr=subprocess.DEVNULL
        )
        if shutil.which("strace")
        else None
    )
    if tracer is None:
        pytest.skip("no strace on this machine")
    time.sleep(0.5)
    memory = HostSourceMemory(pod_of(process.pid), Tracking.USERFAULTFD, injector())
    assert memory.round(sink).copied_bytes > 8192 * PAGE
    memory.close()
    tracer.terminate()
    tracer.wait()
