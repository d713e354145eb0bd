"""Two nodes and a client on one machine, without Kubernetes: namespaces over a Debian root.

A node is a mount and a network namespace. Its "pods" are plain runc containers
laid out as containerd's CRI lays them out, so that the real ports find them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.copies import best_tracking
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Tracking
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.pages.injector import Injector
from godwit_agent.install.node import CGROUPS
from godwit_api.errors import GodwitError
from godwit_testbed.build import builder_root

BASE = builder_root()
needs_tracking = pytest.mark.skipif(
    best_tracking() is not Tracking.USERFAULTFD, reason="the kernel cannot track writes"
)
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "node-agent/native"
_SHIM = ("criu-shim.c", "criu-vmas.c", "criu-shared.c", "criu-postcopy.c")
RUNC_ROOT = "/run/containerd/runc/k8s.io"
TASKS = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

EMPTY_DIR = "volumes/kubernetes.io~empty-dir/data"

# containerd's default (oci.WithDefaultUnixCaps)
_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID"),
    *("SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)


def injector() -> Injector:
    """One in the cgroup of the test."""
    return Injector(lambda _: None)


_SETUP = """
set -e
mount --make-rprivate /
mkdir -p {dir}/up {dir}/work {dir}/root
mount -t overlay overlay -o lowerdir={base},upperdir={dir}/up,workdir={dir}/work {dir}/root
cd {dir}/root
mkdir -p old base
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --bind /sys/kernel/security sys/kernel/security || true
[ ! -d /sys/fs/selinux ] || mount --bind /sys/fs/selinux sys/fs/selinux
mount --rbind /dev dev
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t tmpfs -o size=8g,mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mount --bind {base} base
pivot_root . old
umount -l /old
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
mkdir -p /opt/godwit/criu/bin /opt/godwit/gate /opt/godwit/bin /opt/godwit/etc {tasks} {runc}
ln -sf ../bin/godwit-hook /opt/godwit/gate/criu
ln -sf godwit-hook /opt/godwit/bin/godwit-runc
ln -sf /usr/bin/tar /opt/godwit/criu/bin/gnu-tar
echo '{{"runtime": "/usr/bin/runc"}}' > /opt/godwit/etc/hook.json
# the product's CRIU is linked with the shim
printf '#!/bin/sh\\nLD_PRELOAD=/opt/godwit/criu/criu-shim.so exec /usr/sbin/criu "$@"\\n' \
  > /opt/godwit/criu/criu
chmod 755 /opt/godwit/criu/criu
echo ready
exec sleep 100000
"""


@functools.cache
def hook() -> Path:
    """The product's own binary, built from this checkout."""
    path = Path(tempfile.mkdtemp(prefix="godwit-hook-")) / "godwit-hook"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    done = subprocess.run(
        ["go", "build", "-trimpath", "-buildvcs=false", "-o", str(path), "./cmd/godwit-hook"],
        cwd=ROOT / "hooks", env={**os.environ, "CGO_ENABLED": "0"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


def build_shim(path: str | Path) -> None:
    """What the product's CRIU is linked with, as a library to preload."""
    sources = [str(NATIVE / name) for name in _SHIM]
    run("gcc", "-O2", "-shared", "-fPIC", "-o", str(path), *sources)


def run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{argv}: {done.stdout}{done.stderr}")
    return done.stdout


@dataclass
class Node:
    name: str
    address: str
    process: subprocess.Popen[str]
    directory: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def layout(self) -> Layout:
        return Layout(host_pid=self.pid, host_netns=f"/proc/{self.pid}/ns/net")

    def run(self, *argv: str, check: bool = True) -> str:
        return run(*self.layout.command(*argv, netns=f"/proc/{self.pid}/ns/net"), check=check)

    def popen(self, *argv: str, **options: object) -> subprocess.Popen[bytes]:
        command = self.layout.command(*argv, netns=f"/proc/{self.pid}/ns/net")
        return subprocess.Popen(command, **options)  # type: ignore[call-overload,no-any-return]


@dataclass
class Pod:
    """A sandbox and one container on a node."""

    node: Node
    uid: str
    ip: str
    sandbox_id: str
    container_id: str
    pause: subprocess.Popen[bytes]
    host_interface: str
    cgroup: str
    output: list[subprocess.Popen[bytes]] = field(default_factory=list)


class Lab:
    """Nodes ``a`` and ``b`` and the client's namespace ``ext``, joined by one bridge in ``ext``."""

    def __init__(self, scratch: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._scratch = scratch
        self.tag = uuid.uuid4().hex[:6]
        # as containerd's CRI does it
        self.cgroup_namespaces = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        self.apparmor = ""  # profile of the containers
        self.selinux = ""  # label of the containers
        self.binds: dict[str, str] = {}  # where containers mount what directories of their node
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise

    def _make(self) -> None:
        self._stack.callback(self._remove_cgroups)
        self.client = self._namespace()
        self._in_client("ip", "link", "set", "lo", "up")
        self._in_client("ip", "link", "add", "br0", "type", "bridge")
        self._in_client("ip", "addr", "add", "10.99.0.1/24", "dev", "br0")
        self._in_client("ip", "link", "set", "br0", "up")
        self.a = self._node("a", "10.99.0.11")
        self.b = self._node("b", "10.99.0.12")

    def close(self) -> None:
        self._stack.close()

    def route(self, ip: str, node: Node) -> None:
        self._in_client("ip", "route", "replace", f"{ip}/32", "via", node.address)

    def _in_client(self, *argv: str) -> str:
        return run("nsenter", f"--net=/proc/{self.client.pid}/ns/net", *argv)

    def _namespace(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 100000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    def _node(self, name: str, address: str) -> Node:
        directory = self._scratch / name
        directory.mkdir()
        setup = _SETUP.format(dir=directory, base=BASE, tasks=TASKS, runc=RUNC_ROOT)
        process = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--ipc", "bash", "-c", setup],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        self._stack.callback(_end, process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        self._stack.callback(_end_within, os.readlink(f"/proc/{process.pid}/ns/mnt"))
        node = Node(name, address, process, directory)
        self._in_client(
            *("ip", "link", "add", f"v{name}", "type", "veth"),
            *("peer", "name", "up0", "netns", str(node.pid)),
        )
        self._in_client("ip", "link", "set", f"v{name}", "master", "br0", "up")
        node.run("ip", "addr", "add", f"{address}/24", "dev", "up0")
        node.run("ip", "link", "set", "up0", "up")
        node.run("ip", "route", "add", "default", "via", "10.99.0.1")
        local = node.layout.local
        shutil.copy(hook(), local("/opt/godwit/bin/godwit-hook"))
        shim, tar = (
            str(local("/opt/godwit/criu/criu-shim.so")),
            str(local("/opt/godwit/criu/bin/tar")),
        )
        build_shim(shim)
        run("gcc", "-O2", "-static", "-o", tar, str(NATIVE / "criu-tar.c"))
        return node

    # -- pods ---------------------------------------------------------------------------------
    def sandbox(self, node: Node, ip: str) -> Pod:
        """A pod's network: point to point, as the CNI plugin ``ptp`` makes it."""
        number = uuid.uuid4().hex
        pause = node.popen(
            *("unshare", "--net", "--ipc", "--uts", "sleep", "100000"),
            stdin=subprocess.DEVNULL,
        )
        while Path(f"/proc/{pause.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.005)
        host = f"h{number[:6]}"
        enter = ("nsenter", f"--net=/proc/{pause.pid}/ns/net", "ip")
        node.run(
            *("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0"),
            *("netns", str(pause.pid)),
        )
        run(*enter, "link", "set", "lo", "up")
        run(*enter, "addr", "add", f"{ip}/32", "dev", "eth0")
        run(*enter, "link", "set", "eth0", "up")
        run(*enter, "route", "add", "169.254.1.1", "dev", "eth0")
        run(*enter, "route", "add", "default", "via", "169.254.1.1")
        node.run("ip", "addr", "add", "169.254.1.1/32", "dev", host)
        node.run("ip", "link", "set", host, "up")
        sandbox_id, container_id = f"s{number[:12]}", f"c{number[:12]}"
        pod = Pod(
            node, str(uuid.uuid4()), ip, sandbox_id, container_id, pause, host,
            f"/godwit-lab-{self.tag}/{container_id}",
        )  # fmt: skip
        self._bundle(pod, sandbox_id, "sandbox", {})
        node.layout.local(f"{TASKS}/{sandbox_id}/init.pid").write_text(str(pause.pid))
        self._stack.callback(self._remove, pod)
        return pod

    def bundle(self, pod: Pod, argv: list[str], *, terminal: bool = False) -> str:
        """The container's bundle, root mounted; returns its host path."""
        node = pod.node
        node.run("mkdir", "-p", f"{TASKS}/{pod.container_id}")
        directory = f"{TASKS}/{pod.container_id}"
        for name in ("rootfs", "upper", "work", "shm", EMPTY_DIR):
            node.run("mkdir", "-p", f"{directory}/{name}")
        options = f"lowerdir=/base,upperdir={directory}/upper,workdir={directory}/work"
        node.run("mount", "-t", "overlay", "overlay", "-o", options, f"{directory}/rootfs")
        node.run("mount", "-t", "tmpfs", "shm", f"{directory}/shm")
        spec = json.loads(
            node.run("sh", "-c", "cd /tmp && rm -f config.json && runc spec && cat config.json")
        )
        spec["process"].update(args=argv, terminal=terminal, cwd="/data", rlimits=[])
        for kind in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][kind] = [f"CAP_{name}" for name in _CAPABILITIES]
        spec["root"] = {"path": "rootfs", "readonly": False}
        bind = {"type": "bind", "options": ["rbind", "rprivate", "rw"]}
        spec["mounts"] = [one for one in spec["mounts"] if one["destination"] != "/dev/shm"]
        spec["mounts"] += [
            {"destination": "/dev/shm", "source": f"{directory}/shm", **bind},
            {"destination": "/data", "source": f"{directory}/{EMPTY_DIR}", **bind},
            *({"destination": to, "source": path, **bind} for to, path in self.binds.items()),
        ]
        spec["process"]["apparmorProfile"] = self.apparmor
        spec["process"]["selinuxLabel"] = self.selinux
        spec["linux"]["cgroupsPath"] = pod.cgroup
        spec["linux"]["namespaces"] = [
            {"type": "pid"}, {"type": "mount"},
            {"type": "network", "path": f"/proc/{pod.pause.pid}/ns/net"},
            {"type": "ipc", "path": f"/proc/{pod.pause.pid}/ns/ipc"},
            {"type": "uts", "path": f"/proc/{pod.pause.pid}/ns/uts"},
            *([{"type": "cgroup"}] if self.cgroup_namespaces else []),
        ]  # fmt: skip
        self._bundle(pod, pod.container_id, "container", spec)
        return directory

    def start(
        self,
        pod: Pod,
        argv: list[str],
        files: Path | None = None,
        console: Console | None = None,
    ) -> None:
        """``files``: a directory to put into the container's ``/lab``."""
        directory = self.bundle(pod, argv, terminal=console is not None)
        if files:
            shutil.copytree(files, pod.node.layout.local(f"{directory}/rootfs/lab"))
        process = pod.node.popen(
            *("runc", "--root", RUNC_ROOT, "run", "--detach", "--bundle", directory),
            *("--pid-file", f"{directory}/init.pid"), *_console(console), pod.container_id,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        pod.output.append(process)
        if process.wait(20):
            assert process.stdout
            raise AssertionError(process.stdout.read())

    def create(
        self, pod: Pod, argv: list[str], console: Console | None = None, *, start: bool = True
    ) -> subprocess.Popen[bytes]:
        """The successor's container, as containerd's shim creates and starts it: through our
        wrapper."""
        directory = self.bundle(pod, argv, terminal=console is not None)
        runtime = ("/opt/godwit/bin/godwit-runc", "--root", RUNC_ROOT)
        then = f"{' '.join(runtime)} start {pod.container_id}" if start else "true"
        process = pod.node.popen(
            *("sh", "-c", 'then=$1; shift; "$@" && exec $then', "sh", then, *runtime, "create"),
            *("--bundle", directory, "--pid-file", f"{directory}/init.pid"),
            *_console(console), pod.container_id,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        pod.output.append(process)
        return process

    def _bundle(self, pod: Pod, identifier: str, kind: str, spec: dict[str, object]) -> None:
        directory = pod.node.layout.local(f"{TASKS}/{identifier}")
        directory.mkdir(exist_ok=True, parents=True)
        spec["annotations"] = {
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": pod.sandbox_id,
            "io.kubernetes.cri.sandbox-uid": pod.uid,
            "io.kubernetes.cri.sandbox-name": "redis-0",
            "io.kubernetes.cri.sandbox-namespace": "default",
        }
        if kind == "container":
            spec["annotations"]["io.kubernetes.cri.container-name"] = "main"  # type: ignore[index]
        (directory / "config.json").write_text(json.dumps(spec))
        options = {"BinaryName": "/opt/godwit/bin/godwit-runc"}
        (directory / "options.json").write_text(json.dumps(options))

    def _remove(self, pod: Pod) -> None:
        """Also after a test that failed in the middle of a freeze."""
        for directory in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                # runc and the CRIU it has started; what CRIU traces cannot end before it
                text = (directory / "cmdline").read_text()
                if "checkpoint\0" in text and pod.container_id in text:
                    os.killpg(int(directory.name), signal.SIGKILL)
        with contextlib.suppress(GodwitError):
            HostCgroups(pod.node.layout).kill([pod.container_id])
        pod.node.run(
            "runc", "--root", RUNC_ROOT, "delete", "--force", pod.container_id, check=False
        )
        pod.pause.kill()
        pod.pause.wait()
        for process in pod.output:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def _remove_cgroups(self) -> None:
        for top in Path("/sys/fs/cgroup").glob(f"*/godwit-lab-{self.tag}"):
            for path in (*top.iterdir(), top):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
        # guards, and what outlives an agent (survive.py), have places of their own, which another
        # lab may use
        for name in CGROUPS:
            for path in Path("/sys/fs/cgroup").glob(f"*/{name}"):
                with contextlib.suppress(OSError):
                    path.rmdir()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def _end_within(namespace: str) -> None:
    """Whatever a test that failed has left in a node's mount namespace: the restores that wait."""
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if directory.name.isdecimal() and os.readlink(directory / "ns/mnt") == namespace:
                os.kill(int(directory.name), signal.SIGKILL)


def _console(console: Console | None) -> tuple[str, ...]:
    return ("--console-socket", console.path) if console else ()


class Console:
    """Takes the master side of a container's terminal, as containerd's shim does."""

    def __init__(self, node: Node) -> None:
        self.path = f"/run/console-{uuid.uuid4().hex[:6]}"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(node.layout.local(self.path)))
        self._socket.listen()
        self._socket.settimeout(30)
        self._master = -1

    def receive(self) -> int:
        """The master side; waits for it."""
        if self._master < 0:
            connection, _ = self._socket.accept()
            with connection:
                _, received, _, _ = socket.recv_fds(connection, 4096, 1)
            (self._master,) = received
        return self._master

    def close(self) -> None:
        self._socket.close()
        if self._master >= 0:
            os.close(self._master)


class Counter:
    """One TCP connection that increments a counter all the time and remembers its longest wait."""

    def __init__(self, lab: Lab, ip: str, port: int = 6379) -> None:
        self._thread = NetnsThread(f"/proc/{lab.client.pid}/ns/net")
        self._socket = self._thread.call(lambda: socket.create_connection((ip, port), 5))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(20)
        self.replies = 0
        self.worst_ms = 0.0
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._worker = threading.Thread(target=self._run, daemon=True)
        self._worker.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                begin = time.monotonic()
                reply = self.ask(b"INCR n\r\n")
                self.worst_ms = max(self.worst_ms, (time.monotonic() - begin) * 1000)
                self.replies += 1
                if reply != b":%d\r\n" % self.replies:
                    raise AssertionError(f"reply {reply!r} after {self.replies}")
                time.sleep(0.001)
        except (OSError, AssertionError) as error:
            self.error = error

    def ask(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        data = b""
        while not data.endswith(b"\r\n"):
            got = self._socket.recv(4096)
            if not got:
                raise ConnectionResetError("closed by the pod")
            data += got
        return data

    def stop(self) -> None:
        self._stop.set()
        self._worker.join(25)
        self._socket.close()
        self._thread.close()


@contextlib.contextmanager
def lab(scratch: Path) -> Iterator[Lab]:
    made = Lab(scratch)
    try:
        yield made
    finally:
        made.close()
