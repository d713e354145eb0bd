"""The inspector names what CRIU would refuse, in a container that has all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops import surroundings
from godwit_agent.hostops.inspector import HostInspector
from godwit_agent.hostops.pods import HostPods
from godwit_api.reasons import Reason
from host.lab import BASE, RUNC_ROOT, Lab, lab

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/runc").exists(), reason=f"no runc in {BASE}"),
]

HARMLESS = """
import os, select, socket, threading, time
pair = socket.socketpair()
listener = socket.create_server(("0.0.0.0", 99))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
poll, null, event = select.epoll(), open("/dev/null"), os.eventfd(0)
"""
REFUSED = """
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
multipath = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
import ctypes
libc = ctypes.CDLL(None)
libc.syscall(323, 1)
"""
READY = "open('/dev/shm/ready', 'w').close()\ntime.sleep(1000)\n"


@pytest.fixture
def scene() -> Iterator[Lab]:
    scratch = Path(tempfile.mkdtemp(prefix="godwit-lab-", dir="/var/tmp"))
    with lab(scratch) as made:
        yield made
    shutil.rmtree(scratch, ignore_errors=True)


def reasons(scene: Lab, program: str) -> tuple[set[Reason], str, int]:
    pod = scene.sandbox(scene.a, "10.98.0.7")
    scene.start(pod, ["python3", "-c", program])
    state = HostPods(scene.a.layout).find(pod.uid)
    root = Path(f"/proc/{state.containers[0].init_pid}/root")
    for _ in range(200):
        if (root / "dev/shm/ready").exists():
            break
        time.sleep(0.05)
    found = HostInspector(scene.a.layout).inspect(state)
    text = "\n".join(one.message for one in found.obstacles)
    return {one.reason for one in found.obstacles}, text, found.containers[0].memory_bytes


def test_nothing_is_found_in_an_ordinary_process(scene: Lab) -> None:
    found, text, memory = reasons(scene, HARMLESS + READY)
    assert found == set(), text
    assert memory > 1 << 20


def test_everything_that_cannot_follow_is_named_at_once(scene: Lab) -> None:
    found, text, _ = reasons(scene, HARMLESS + REFUSED + READY)
    assert found >= {Reason.SOCKET_FAMILY, Reason.FILE_CANNOT_FOLLOW}, text
    for word in ("packet", "raw socket", "multipath TCP", "userfaultfd"):
        assert word in text


def test_a_process_that_came_in_from_outside(scene: Lab) -> None:
    pod = scene.sandbox(scene.a, "10.98.0.7")
    scene.start(pod, ["sleep", "1000"])
    state = HostPods(scene.a.layout).find(pod.uid)
    inspector = HostInspector(scene.a.layout)
    assert inspector.inspect(state).obstacles == ()
    enter = f"runc --root {RUNC_ROOT} exec --detach {pod.container_id} tail -f /etc/passwd"
    scene.a.run("sh", "-c", f"{enter} >/dev/null 2>&1 </dev/null")
    (found,) = inspector.inspect(state).obstacles
    assert found.reason is Reason.FOREIGN_PROCESS
    assert "tail" in found.message


def test_ipc_objects_of_a_namespace() -> None:
    script = "ipcmk -M 4096 >&2; ipcmk -S 2 >&2; echo ready; exec sleep 1000"
    with subprocess.Popen(
        ["unshare", "--ipc", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        try:
            assert surroundings._ipc_objects(process.pid) == ["1 shm", "1 sem"]
            assert surroundings._ipc_objects(os.getpid()) != ["1 shm", "1 sem"]
        finally:
            process.kill()
