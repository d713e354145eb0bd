"""Files that lie on a network file system, which both nodes mount at once.

The server keeps the source's locks until its frozen processes have ended, and CRIU waits for a
lock that it cannot have (F_SETLKW, criu/file-lock.c): a restore would hang. A file that was
removed while it was open is a hidden name of the one client that has it (``.nfs…``), which
removes it when its own process ends. What the source's processes have written may still be in
its page cache: it must reach the server before the target reads, and must not come later.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import PurePath

from godwit_agent.hostops import procs

KINDS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "lustre", "gpfs", "beegfs", "afs", "ocfs2")
)
_FUSE = "fuse."

_libc = ctypes.CDLL(None, use_errno=True)


def mounts(mountinfo: str, kinds: Collection[str] = KINDS) -> dict[int, str]:
    """Mount id to kind, of network file systems (proc_pid_mountinfo(5)). FUSE may be one."""
    found = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind = right.split()[0]
        if kind in kinds or kind.startswith(_FUSE):
            found[int(left.split()[0])] = kind
    return found


def faults(target: str, fdinfo: str, known: Mapping[int, str]) -> Iterator[str]:
    """Why an open file cannot follow; ``fdinfo`` as in proc_pid_fdinfo(5)."""
    fields = [line.split() for line in fdinfo.splitlines()]
    kind = next((known.get(int(f[1])) for f in fields if f[:1] == ["mnt_id:"]), None)
    if kind is None:
        return
    if any(f[:1] == ["lock:"] for f in fields):
        yield (
            f"holds a lock on {target}, which lies on a network file system ({kind}): the source "
            "would keep it until the copy runs; let go of it, or lock a file elsewhere"
        )
    if PurePath(target.removesuffix(" (deleted)")).name.startswith(".nfs"):
        yield f"has a removed file of a network file system ({kind}) open: close it"


class Unwritten:
    """Network file systems of some processes, opened while they run."""

    def __init__(self, pids: Iterable[int], kinds: Collection[str] = KINDS) -> None:
        self._open: dict[int, int] = {}  # device to descriptor
        for pid in pids:
            info = procs.read(pid, "mountinfo")
            known = mounts(info, kinds)
            for line in info.splitlines():
                fields = line.split()
                if int(fields[0]) in known:
                    self._add(f"/proc/{pid}/root{procs.unescape(fields[4])}")

    def _add(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        known = self._open.setdefault(os.fstat(fd).st_dev, fd)
        if known != fd:
            os.close(fd)

    def flush(self) -> None:
        """Everything that has been written is with the server. ``OSError``."""
        for fd in self._open.values():
            if _libc.syncfs(fd):
                number = ctypes.get_errno()
                raise OSError(number, f"syncfs of a network file system: {os.strerror(number)}")

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
