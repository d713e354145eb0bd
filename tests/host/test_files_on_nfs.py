"""A process whose files lie on NFS moves between two clients of one server.

Skipped where the kernel has no NFS, or where its server is not installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import nfs
from godwit_agent.hostops import procs
from godwit_agent.hostops.files import netfiles
from godwit_agent.hostops.inspector import HostInspector
from godwit_agent.hostops.model import PodState
from host.lab import BASE, ROOT, Lab, Node, Pod
from host.test_kernel_objects import move, output
from host.test_mechanisms import Agent

_ABSENT = nfs.missing() if os.geteuid() == 0 else "needs root"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(_ABSENT is not None, reason=str(_ABSENT)),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no Python in {BASE}"),
]

IP = "10.98.0.6"
SERVER = "10.99.0.1"
SERVERS = ROOT / "lab/servers"
VOLUME = "/var/lib/volume"


@contextlib.contextmanager
def mounted(node: Node, directory: str) -> Iterator[None]:
    """As a kubelet mounts it. A server knows its clients by the names of their hosts."""
    options = f"addr={SERVER},clientaddr={node.address},vers=4.2,proto=tcp,sec=sys,nosharecache"
    node.run("mkdir", "-p", directory)
    node.run(
        *("nsenter", f"--uts=/proc/{node.pid}/ns/uts", "sh", "-c"),
        *('hostname "$0" && mount -i -t nfs4 -o "$1" "$2" "$3"', node.name),
        *(options, f"{SERVER}:/", directory),
    )
    try:
        yield
    finally:
        node.run("umount", "-l", directory)


@pytest.fixture
def volume(scene: Lab) -> Iterator[Path]:
    """What the server exports; both nodes have it mounted, containers at ``/net``."""
    server = nfs.serving("nsenter", f"--net=/proc/{scene.client.pid}/ns/net")
    with server as directory, mounted(scene.a, VOLUME), mounted(scene.b, VOLUME):
        scene.binds["/net"] = VOLUME
        yield directory


def start(scene: Lab, node: Node, *argv: str) -> PodState:
    pod = scene.sandbox(node, IP)
    scene.start(pod, list(argv), SERVERS)
    node.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    scene.route(IP, node)
    return Agent(node).pods.find(pod.uid)


def await_port(scene: Lab) -> None:
    """The program has come so far that it listens."""
    probe = f"import socket; socket.create_connection(({IP!r}, 7000), 5)"
    enter = ("nsenter", f"--net=/proc/{scene.client.pid}/ns/net")
    deadline = time.monotonic() + 60
    while subprocess.run((*enter, sys.executable, "-c", probe), capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def test_every_line_is_there_once(scene: Lab, volume: Path) -> None:
    """Appended, written at a descriptor's offset, and through a shared map; there and back."""
    state = start(scene, scene.a, "python3", "/lab/ledger.py", "/net")
    await_port(scene)
    enter = ("nsenter", f"--net=/proc/{scene.client.pid}/ns/net")
    using = subprocess.Popen(
        (*enter, sys.executable, str(SERVERS / "ledgers.py"), IP, "7000"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert using.stdout
    assert using.stdout.readline() == "ready\n"
    for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
        _, state = move(scene, state, here, there)
        kinds = netfiles.mounts(procs.read(state.containers[0].init_pid, "mountinfo"))
        assert set(kinds.values()) == {"nfs4"}
    said, _ = using.communicate(timeout=120)
    found = json.loads(said.splitlines()[-1])
    assert found["error"] is None, found
    print(f"{found['lines']} lines, longest wait {found['worst_ms']} ms")
    wanted = {"appended": found["content"], "written": found["content"], "mapped": found["mapped"]}
    seen = Path(f"/proc/{state.containers[0].init_pid}/root/net")
    assert digests(seen, wanted) == wanted
    os.sync()  # what was written last may still be with the client
    assert digests(volume, wanted) == wanted


def test_reader_of_what_another_client_writes(scene: Lab, volume: Path) -> None:
    """The file grows all the time, also while its reader stands still. Without an end: what is
    written last a client may not see until it opens the file again (nfs(5), close-to-open)."""
    log = volume / "log"
    log.touch()
    state = start(scene, scene.a, "python3", "/lab/reader.py", "/net/log", "/tmp/seen", "rb")
    await_port(scene)
    stop, written = threading.Event(), 0

    def write() -> None:
        nonlocal written
        with log.open("a", buffering=1) as file:
            while not stop.wait(0.01):
                written += 1
                print(written, file=file)

    def read_on(pod: Pod, state: PodState) -> None:
        """All that has been written up to now."""
        seen = Path(f"/proc/{state.containers[0].init_pid}/root/tmp/seen")
        wanted = written
        deadline = time.monotonic() + 90  # as long as a client may believe what it knows of a file
        while (number := int(seen.read_text() or 0) if seen.exists() else 0) < wanted:
            assert time.monotonic() < deadline, (number, wanted, output(pod))
            time.sleep(0.2)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
            pod, state = move(scene, state, here, there)
            read_on(pod, state)
    finally:
        stop.set()
        writer.join()


def test_refused_by_name(scene: Lab, volume: Path) -> None:
    """Locks of both kinds, a removed file, and one that another client has replaced."""
    held = ("locked", "flocked", "removed", "open")
    state = start(scene, scene.a, "python3", "/lab/holder.py", "/net", *held)
    await_port(scene)
    other = scene.b.layout.local(VOLUME)
    (other / "new").write_text("another file")
    (other / "new").rename(other / "open")
    assert (volume / "open").read_text() == "another file"
    found = HostInspector(scene.a.layout).inspect(state)
    told = [one.message for one in found.obstacles]
    assert [text for text in told if "holds a lock on /net/locked" in text], told
    assert [text for text in told if "holds a lock on /net/flocked" in text], told
    assert [text for text in told if "removed file of a network file system" in text], told
    assert [text for text in told if "has /net/open open, which has been renamed" in text], told
