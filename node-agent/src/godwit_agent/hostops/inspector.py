"""What CRIU cannot dump, or what cannot follow, found by looking at the processes themselves."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from godwit_agent.hostops import procs
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, ContainerFacts, Inspection, Obstacle, PodState
from godwit_api.errors import GodwitError
from godwit_api.reasons import Reason

# Anonymous inodes that CRIU 4.2 has no dump for (criu/files-ext.c, criu/files.c).
_ANON = {
    "io_uring": (Reason.IO_URING, "uses io_uring"),
    "perf_event": (Reason.FILE_CANNOT_FOLLOW, "has a perf event open"),
    "userfaultfd": (Reason.FILE_CANNOT_FOLLOW, "has a userfaultfd open"),
    "bpf-prog": (Reason.FILE_CANNOT_FOLLOW, "has a BPF program open"),
    "kvm-vm": (Reason.DEVICE, "runs a virtual machine"),
    "landlock-ruleset": (Reason.FILE_CANNOT_FOLLOW, "has a Landlock rule set open"),
}
# Character devices that runc gives every container (runtime-spec, default devices).
_DEVICES = frozenset(
    ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
)


_DEVICE_DIRECTORIES = ("/dev/pts/", "/dev/shm/", "/dev/mqueue/")  # noqa: S108 - never opened


class HostInspector:
    """The real ``Inspector``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def inspect(self, pod: PodState) -> Inspection:
        obstacles: dict[tuple[Reason, str], None] = {}
        facts = []
        for container in pod.containers:
            if not container.init_pid:
                continue
            pids: tuple[int, ...] = ()
            try:
                pids = tuple(procs.tree(container.init_pid))
                for pid in pids:
                    for reason, message in _process(pid):
                        text = f"container {container.name}, process {_name(pid)}: {message}"
                        obstacles[(reason, text)] = None
                for reason, message in _sockets(container.init_pid, pids):
                    obstacles[(reason, f"container {container.name}: {message}")] = None
            except (OSError, GodwitError) as error:
                text = f"container {container.name}: {error}"
                obstacles[(Reason.PROCESS_CANNOT_BE_INSPECTED, text)] = None
            facts.append(self._facts(container, pids))
        if pod.link is None:
            obstacles[(Reason.NETWORK_NOT_ROUTED, "the pod has no interface eth0 of its own")] = (
                None
            )
        found = tuple(Obstacle(reason, message) for reason, message in obstacles)
        return Inspection(obstacles=found, containers=tuple(facts))

    def _facts(self, container: Container, pids: tuple[int, ...]) -> ContainerFacts:
        memory = sum(_private_bytes(pid) for pid in pids)
        size = 0
        if container.upper_dir:
            size = _tree_bytes(self._layout.local(container.upper_dir))
        return ContainerFacts(
            name=container.name,
            id=container.id,
            memory_bytes=memory,
            files_bytes=size,
            processes=len(pids),
        )


def _process(pid: int) -> Iterator[tuple[Reason, str]]:
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                target = os.readlink(f"{directory}/{name}")
                if target.startswith("anon_inode:"):
                    kind = target.removeprefix("anon_inode:").strip("[]")
                    if kind in _ANON:
                        yield _ANON[kind]
                elif (
                    target.startswith("/dev/")
                    and target not in _DEVICES
                    and not target.startswith(_DEVICE_DIRECTORIES)
                ):
                    yield Reason.DEVICE, f"has the device {target} open"
    for mapping in procs.mappings(pid):
        if "hugetlb" in mapping.name or mapping.name.startswith("/anon_hugepage"):
            yield Reason.HUGE_PAGES, "uses huge pages of hugetlbfs"
            break


def _sockets(init_pid: int, pids: tuple[int, ...]) -> Iterator[tuple[Reason, str]]:
    """Families CRIU has no dump for, and unix streams whose other end is elsewhere."""
    held = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
                    if match:
                        held.add(match[1])
    known = set()
    tables = ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "icmp", "unix", "netlink")
    for table in (*tables, "packet"):
        for line in procs.read(init_pid, f"net/{table}").splitlines()[1:]:
            fields = line.split()
            column = {"unix": 6, "netlink": 9, "packet": 8}.get(table, 9)
            if len(fields) > column:
                inode = fields[column]
                if inode in held:
                    known.add(inode)
                    if table in ("raw", "raw6"):
                        yield Reason.SOCKET_FAMILY, "has a raw IP socket open"
    unknown = held - known
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
                    if match and match[1] in unknown:
                        family = os.getxattr(f"/proc/{pid}/fd/{name}", "system.sockprotoname")
                        protocol = family.rstrip(b"\0").decode(errors="replace")
                        if protocol not in ("TCP", "TCPv6", "UDP", "UDPv6", "UNIX", "UNIX-STREAM"):
                            yield Reason.SOCKET_FAMILY, f"has a socket of protocol {protocol} open"


def _private_bytes(pid: int) -> int:
    for line in procs.read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _tree_bytes(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size  # noqa: PTH118
    return total


def _name(pid: int) -> str:
    return procs.read(pid, "comm").strip() or str(pid)
