"""What CRIU cannot dump, or what cannot follow, found by looking at the processes themselves.

The list is CRIU 4.2's: files-ext.c (unknown files), sk-inet.c, sk-unix.c,
mount.c. What is only a matter of the pod's specification the operator checks.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from godwit_agent.hostops import procs, security, surroundings
from godwit_agent.hostops.files import netfiles, watches
from godwit_agent.hostops.files.filesource import size_of
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, ContainerFacts, Inspection, Obstacle, PodState
from godwit_agent.hostops.net import sockets
from godwit_agent.hostops.pages import sharedobjects
from godwit_api.errors import GodwitError
from godwit_api.reasons import Reason

Found = tuple[Reason, str]

# Anonymous inodes that CRIU takes along; all others it refuses.
_ANONYMOUS = frozenset(("eventfd", "eventpoll", "inotify", "signalfd", "timerfd", "pidfd"))
# Devices that every container has (OCI runtime specification, default devices).
_DEVICES = frozenset(
    ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts/ptmx")
)
_DEVICE_DIRECTORIES = ("/dev/pts/", "/dev/shm/", "/dev/mqueue/")  # noqa: S108
_MPTCP = 262  # IPPROTO_MPTCP, linux/in.h
_PROTOCOLS: dict[int, set[int]] = {
    socket.SOCK_STREAM: {socket.IPPROTO_TCP},
    socket.SOCK_DGRAM: {socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE},
}
_FAMILIES = {16: "netlink", 17: "packet", 38: "kernel crypto", 40: "vsock", 44: "XDP"}
# Directories that the kubelet swaps by a symbolic link when their content changes.
_ATOMIC_VOLUME = "/..2"
_NAMESPACES = ("pid", "mnt", "net", "ipc", "uts", "user")


class HostInspector:
    """The real ``Inspector``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def inspect(self, pod: PodState) -> Inspection:
        found: dict[Obstacle, None] = {}
        facts = []
        for container in pod.containers:
            pids = procs.tree(container.init_pid) if container.init_pid else ()
            for reason, message in self._container(pod, container, pids):
                found[Obstacle(reason, f"container {container.name}: {message}")] = None
            facts.append(self._facts(pod, container, pids))
        for reason, message in surroundings.of_pod(pod):
            found[Obstacle(reason, message)] = None
        if pod.link is None:
            message = "the pod has no interface eth0 with an end on this node"
            found[Obstacle(Reason.NETWORK_NOT_ROUTED, message)] = None
        return Inspection(obstacles=tuple(found), containers=tuple(facts))

    def _container(
        self, pod: PodState, container: Container, pids: tuple[int, ...]
    ) -> Iterator[Found]:
        if not pids:
            yield Reason.POD_NOT_RUNNING, "has no process"
            return
        try:
            yield from _namespaces(container.init_pid, pids)
            for pid in pids:
                for reason, message in (*_state(pid), *_files(pid), *_memory(pid)):
                    yield reason, f"process {_name(pid)} {message}"
            yield from _sockets(pod, pids)
            yield from surroundings.mounts(container)
            yield from self._labels(container.init_pid, pids)
            yield from _watches(container.init_pid, pids)
            yield from _terminals(pids)
        except (OSError, GodwitError) as error:
            yield Reason.PROCESS_CANNOT_BE_INSPECTED, str(error)

    def _labels(self, init_pid: int, pids: tuple[int, ...]) -> Iterator[Found]:
        """Debian builds CRIU without SELinux (criu/lsm.c, CONFIG_HAS_SELINUX): what it restores
        keeps the label of the container runtime, whatever that gave the container."""
        if not security.selinux(self._layout):
            return
        inherited = procs.security_labels(int(procs.status(init_pid).get("PPid", "0")))
        for pid in pids:
            for label in sorted(procs.security_labels(pid) - inherited):
                message = (
                    f"process {_name(pid)} runs under the SELinux label {label}, which its copy "
                    "would not have: move pods of nodes whose runtime gives containers no label "
                    "(containerd: enable_selinux = false)"
                )
                yield Reason.SECURITY_LABEL, message

    def _facts(self, pod: PodState, container: Container, pids: tuple[int, ...]) -> ContainerFacts:
        return ContainerFacts(
            name=container.name,
            id=container.id,
            memory_bytes=sum(_anonymous_bytes(pid) for pid in pids)
            + sharedobjects.used_bytes(sharedobjects.of(pids)),
            files_bytes=size_of(self._layout, pod, container.name),
            processes=len(pids),
        )


def _namespaces(init_pid: int, pids: tuple[int, ...]) -> Iterator[Found]:
    for kind in _NAMESPACES:
        home = procs.namespace(init_pid, kind)
        for pid in pids:
            own = procs.namespace(pid, kind)
            if home and own and own != home:
                message = f"process {_name(pid)} has made a {kind} namespace of its own"
                yield Reason.NESTED_NAMESPACE, message


def _state(pid: int) -> Iterator[Found]:
    status = procs.status(pid)
    if status.get("TracerPid", "0") != "0":
        yield Reason.TRACED_PROCESS, "is being traced (a debugger, strace)"
    if "T" in procs.states(pid):
        message = "is stopped by a signal (SIGSTOP, Ctrl-Z): let it go on, or end it"
        yield Reason.STOPPED_PROCESS, message


def _files(pid: int) -> Iterator[Found]:
    queues = procs.message_queues(pid)
    network = netfiles.mounts(procs.read(pid, "mountinfo"))
    for number, target in procs.descriptors(pid):
        about = procs.stat(pid, number)
        if network and (told := list(_on_network(pid, number, target, network))):
            yield from ((Reason.FILE_CANNOT_FOLLOW, fault) for fault in told)
        elif about and about.st_dev in queues:
            yield Reason.FILE_CANNOT_FOLLOW, f"has the POSIX message queue {target} open"
        elif about and about.st_nlink and target.endswith(" (deleted)"):
            message = f"holds {target} open, which is there under another name (a hard link)"
            yield Reason.FILE_CANNOT_FOLLOW, message
        if target.startswith("anon_inode:"):
            kind = target.removeprefix("anon_inode:").strip("[]")
            if kind == "eventfd" and "eventfd-semaphore: 1" in procs.read(pid, f"fdinfo/{number}"):
                yield (
                    Reason.FILE_CANNOT_FOLLOW,
                    "has an eventfd in semaphore mode, which CRIU loses",
                )
            elif kind == "io_uring":
                yield (
                    Reason.IO_URING,
                    (
                        "uses io_uring: turn it off in the application, or give the pod the "
                        "seccomp profile RuntimeDefault, which refuses it"
                    ),
                )
            elif kind not in _ANONYMOUS:
                yield Reason.FILE_CANNOT_FOLLOW, f"has a {kind} open"
        elif target.startswith("/dev/"):
            known = target.removeprefix("/dev/").removesuffix(" (deleted)") in _DEVICES
            if not known and not target.startswith(_DEVICE_DIRECTORIES):
                yield Reason.DEVICE, f"has the device {target} open"
        elif _ATOMIC_VOLUME in target:
            yield Reason.FILE_CANNOT_FOLLOW, f"holds {target} open, which the kubelet replaces"


def _on_network(pid: int, number: int, target: str, network: Mapping[int, str]) -> Iterator[str]:
    info = procs.read(pid, f"fdinfo/{number}")
    kind = network.get(netfiles.mount_of(info) or 0)
    if told := list(netfiles.faults(target, info, network)):
        yield from told
    elif kind is not None:
        yield from netfiles.misnamed(pid, number, target)
        if netfiles.is_fuse(kind):
            yield from netfiles.locked_at_server(pid, number, target)


def _watches(init_pid: int, pids: tuple[int, ...]) -> Iterator[Found]:
    if lost := watches.find(init_pid, pids).lost:
        message = f"{lost} inotify watches are on files without a name (deleted ones)"
        yield Reason.FILE_CANNOT_FOLLOW, message


def _terminals(pids: tuple[int, ...]) -> Iterator[Found]:
    """CRIU looks for the terminal behind /dev/tty at the first process that has it open, which
    is the one that made it (criu/tty.c, tty_verify_ctty)."""
    made = {index for pid in pids for index in procs.terminals_made(pid)}
    for pid in pids if made else ():
        if procs.terminal(pid) in made and any(
            target == "/dev/tty" for _, target in procs.descriptors(pid)
        ):
            message = (
                f"process {_name(pid)} has /dev/tty of a terminal open that was made in the "
                "container (dash does this, bash does not)"
            )
            yield Reason.TERMINAL, message


def _memory(pid: int) -> Iterator[Found]:
    seen: set[str] = set()
    for item in procs.mappings(pid):
        if item.name in seen or not item.name:
            continue
        seen.add(item.name)
        if item.name.startswith("/anon_hugepage") or "/hugepages" in item.name:
            yield Reason.HUGE_PAGES, "uses huge pages of hugetlbfs"
        elif item.name.startswith("anon_inode:"):
            yield Reason.FILE_CANNOT_FOLLOW, f"has mapped {item.name}"
        elif item.name.startswith("/dev/") and not item.name.startswith(
            ("/dev/zero", *_DEVICE_DIRECTORIES)
        ):
            yield Reason.DEVICE, f"has mapped the device {item.name}"


def _sockets(pod: PodState, pids: tuple[int, ...]) -> Iterator[Found]:
    held = list(sockets.of(pids))
    for item in held:
        if fault := _fault(item):
            yield Reason.SOCKET_FAMILY, f"process {_name(item.pid)} {fault}"
    local = {item.inode for item in held if item.family == socket.AF_UNIX}
    if not local:
        return
    peers = sockets.unix_peers(pod.sandbox.netns)
    for item in held:
        peer = peers.get(item.inode, 0) if item.family == socket.AF_UNIX else 0
        if peer and peer not in local:
            message = "has a unix socket connected to a process outside the container"
            yield Reason.SOCKET_FAMILY, f"process {_name(item.pid)} {message}"


def _fault(item: sockets.Socket) -> str | None:
    match item.family:
        case socket.AF_UNIX | socket.AF_NETLINK:
            return None
        case socket.AF_INET | socket.AF_INET6:
            if item.protocol == _MPTCP:
                return "uses multipath TCP (in Go: GODEBUG=multipathtcp=0)"
            if item.protocol in _PROTOCOLS.get(item.kind, set()):
                return None
            if item.kind == socket.SOCK_RAW:
                return "has a raw socket"
            return f"has a socket of protocol {item.protocol}"
    return f"has a {_FAMILIES.get(item.family, f'family {item.family}')} socket"


def _anonymous_bytes(pid: int) -> int:
    for line in procs.lines(pid, "smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


def _name(pid: int) -> str:
    return procs.read(pid, "comm").strip() or str(pid)
