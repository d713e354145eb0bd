"""The inspector names what CRIU would refuse, in a container that has all of it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from godwit_agent.hostops import security, surroundings
from godwit_agent.hostops.inspector import HostInspector
from godwit_agent.hostops.model import Profiles
from godwit_agent.hostops.pods import HostPods
from godwit_api.reasons import Reason
from host.lab import BASE, RUNC_ROOT, Lab

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
# each held in a way that CRIU refuses, loses, or hangs at
LOST = """
import ctypes, os, pty, signal
libc = ctypes.CDLL(None)
semaphore = os.eventfd(3, os.EFD_SEMAPHORE)
first = os.open("first", os.O_RDWR | os.O_CREAT)
os.link("first", "second"); os.unlink("first")
queue = libc.mq_open(b"/queue", os.O_RDWR | os.O_CREAT, 0o600, None)
os.mkdir("/data/inner")
watch = libc.inotify_init()
libc.inotify_add_watch(watch, b"/data/inner", 0x100)
kept = os.open("/data/inner", os.O_RDONLY)
os.rename("/data/inner", "/data/outer")
gone = libc.inotify_init()
open("watched", "w").close()
libc.inotify_add_watch(gone, b"watched", 0x100)
held = os.open("watched", os.O_RDONLY); os.unlink("watched")
if (stopped := os.fork()) == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
os.waitid(os.P_PID, stopped, os.WSTOPPED)
inner, master = pty.fork()
if not inner:
    tty = os.open("/dev/tty", os.O_RDWR); os.write(1, b"x"); signal.pause()
os.read(master, 1)
"""


def _shows_semaphores() -> bool:
    """fs/eventfd.c: Linux 6.1 does not."""
    semaphore = os.eventfd(0, os.EFD_SEMAPHORE)
    shown = Path(f"/proc/self/fdinfo/{semaphore}").read_text()
    os.close(semaphore)
    return "eventfd-semaphore" in shown


SHOWS_SEMAPHORES = _shows_semaphores()
READY = "open('/dev/shm/ready', 'w').close()\ntime.sleep(1000)\n"


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


def test_profiles_that_a_node_lacks(scene: Lab) -> None:
    """The kubelet's directory may lie elsewhere: links lead where they do on the node."""
    wanted = Profiles(seccomp=("there.json", "not/there.json"))
    assert security.missing(scene.a.layout, wanted) == (), "nothing is known of the kubelet"
    scene.a.run("mkdir", "-p", "/srv/kubelet/seccomp")
    scene.a.run("touch", "/srv/kubelet/seccomp/there.json")
    scene.a.run("ln", "-s", "/srv/kubelet", "/var/lib/kubelet")
    (found,) = security.missing(scene.a.layout, wanted)
    assert "not/there.json" in found


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


def test_what_criu_would_lose_or_hang_at_is_named(scene: Lab) -> None:
    found, text, _ = reasons(scene, "import time\n" + LOST + READY)
    assert found == {Reason.FILE_CANNOT_FOLLOW, Reason.STOPPED_PROCESS, Reason.TERMINAL}, text
    words = ["hard link", "message queue", "inotify", "signal", "/dev/tty"]
    if SHOWS_SEMAPHORES:
        words.append("semaphore mode")
    for word in words:
        assert word in text, word
    assert "1 inotify watches" in text
