"""Files that lie on a network file system, which both nodes mount at once.

The server keeps the source's locks until its frozen processes have ended, and CRIU waits for a
lock that it cannot have (F_SETLKW, criu/file-lock.c): a restore would hang. A file that was
removed while it was open is a hidden name of the one client that has it (``.nfs…``,
``.fuse_hidden…``), which removes it when its own process ends. What the source's processes have
written may still be with the source node: it must reach the server before the target reads, and
must not come later.

FUSE is different in two things. A lock that the server keeps is no lock of this kernel: neither
``fdinfo`` nor CRIU knows of it, only the server can be asked (fs/fuse/file.c, ``fuse_setlk``). And
``syncfs`` does not wait for it: the kernel gives such file systems no promise of integrity
(``AS_NO_DATA_INTEGRITY``; older ones write from copies), and does not tell their daemons, which may
hold back what was written to them. ``fsync`` waits for both. A file that has been closed needs
none: closing waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from godwit_agent.hostops import descriptors, procs

KINDS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "lustre", "gpfs", "beegfs", "afs", "ocfs2")
)
_FUSE = "fuse."
_DELETED = " (deleted)"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit machines, fcntl_locking(2)
_AT_ONCE = 16
# linux/fcntl.h, linux/stat.h
_AT_FDCWD, _AT_STATX_FORCE_SYNC = -100, 0x2000
_STATX_BASIC_STATS, _SIZE_OF_STATX = 0x7FF, 256

_libc = ctypes.CDLL(None, use_errno=True)


def mounts(mountinfo: str, kinds: Collection[str] = KINDS) -> dict[int, str]:
    """Mount id to kind, of network file systems (proc_pid_mountinfo(5)). FUSE may be one."""
    found = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind = right.split()[0]
        if kind in kinds or is_fuse(kind):
            found[int(left.split()[0])] = kind
    return found


def is_fuse(kind: str) -> bool:
    return kind == _FUSE[:-1] or kind.startswith(_FUSE)


def mount_of(fdinfo: str) -> int | None:
    """Mount id of an open file, proc_pid_fdinfo(5)."""
    return next((int(f[1]) for f in _fields(fdinfo) if f[:1] == ["mnt_id:"]), None)


def faults(target: str, fdinfo: str, known: Mapping[int, str]) -> Iterator[str]:
    """Why an open file cannot follow; ``fdinfo`` as in proc_pid_fdinfo(5)."""
    kind = known.get(mount_of(fdinfo) or 0)
    if kind is None:
        return
    if any(f[:1] == ["lock:"] for f in _fields(fdinfo)):
        yield (
            f"holds a lock on {target}, which lies on a network file system ({kind}): the source "
            "would keep it until the copy runs; let go of it, or lock a file elsewhere"
        )
    # an NFS client renames the file; a daemon of FUSE, too, and the kernel does not know its name
    if PurePath(target).name.startswith(".nfs") or target.endswith(_DELETED):
        yield f"has a removed file of a network file system ({kind}) open: close it"


def misnamed(pid: int, number: int, target: str) -> Iterator[str]:
    """The same for a file that has another name by now, or none: a client elsewhere has changed
    that, so the path of the open file still says what it was. CRIU opens it by name."""
    opened = procs.stat(pid, number)
    root = Path(f"/proc/{pid}/root")
    try:
        if opened is None or not target.startswith("/") or str(root.readlink()) != "/":
            return
        path = root / target[1:]
        for directory in reversed(path.relative_to(root).parents):
            _renew(root / directory)
        there = path.lstat()
        same = (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
    except OSError:
        # closed meanwhile?
        same = procs.stat(pid, number) is None
    if not same:
        yield (
            f"has {target} open, which has been renamed, removed or replaced on its server (by "
            "another pod?): close it"
        )


def _renew(directory: Path) -> None:
    """An NFS client believes what it knows of a directory for up to a minute (nfs(5),
    ``acdirmax``), and with it which file has which name; unless it is asked not to (statx(2)).
    What is wrong is seen by whoever looks next."""
    area = ctypes.create_string_buffer(_SIZE_OF_STATX)
    _libc.statx(_AT_FDCWD, bytes(directory), _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, area)


def locked_at_server(pid: int, number: int, target: str) -> Iterator[str]:
    """The same for a file on FUSE whose server keeps locks; asks it. Which process of which node
    has the lock is not said, so one that another pod holds counts, too. Whole-file locks of
    flock(2) at the server are nowhere to be seen."""
    try:
        fd = descriptors.of_process(pid, number)
    except OSError:
        return  # closed meanwhile
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0]
    except OSError:
        return  # a kind of file, or a server, that has no locks
    finally:
        os.close(fd)
    if kind != fcntl.F_UNLCK:
        yield (
            f"has {target} open, on which the server of its file system (FUSE) says that somebody "
            "holds a lock; it could not follow: let go of it, or lock a file elsewhere"
        )


class Unwritten:
    """Network file systems of some containers, opened while they run."""

    def __init__(self, pids: Iterable[int], kinds: Collection[str] = KINDS) -> None:
        self._inits = tuple(pids)
        self._open: dict[int, int] = {}  # device to descriptor
        self._fuse: dict[int, frozenset[int]] = {}  # first process of a container to mount ids
        for pid in self._inits:
            info = procs.read(pid, "mountinfo")
            known = mounts(info, kinds)
            self._fuse[pid] = frozenset(number for number in known if is_fuse(known[number]))
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
        files: list[int] = []
        try:
            for init, on_fuse in self._fuse.items():
                for pid in procs.tree(init) if on_fuse else ():
                    files.extend(_written(pid, on_fuse))
                    files.extend(_mapped(pid, self._open))
            if files:
                # each waits for an answer of the server
                with ThreadPoolExecutor(min(_AT_ONCE, len(files))) as pool:
                    list(pool.map(os.fsync, files))
                    list(pool.map(os.close, files))
                files.clear()
        finally:
            for fd in files:
                os.close(fd)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def _written(pid: int, on_fuse: Collection[int]) -> Iterator[int]:
    """Duplicates of what a process has open for writing."""
    for number, _ in procs.descriptors(pid):
        info = procs.read(pid, f"fdinfo/{number}")
        flags = next((int(f[1], 8) for f in _fields(info) if f[:1] == ["flags:"]), 0)
        if flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR) and mount_of(info) in on_fuse:
            try:
                yield descriptors.of_process(pid, number)
            except OSError as error:
                # it runs, and has closed it: closing has written it
                if procs.read(pid, f"fdinfo/{number}"):
                    raise OSError(error.errno, f"file of process {pid}: {error}") from error


def _mapped(pid: int, devices: Collection[int]) -> Iterator[int]:
    """What it has mapped for shared writing, opened anew: a map needs no descriptor."""
    seen = set()
    for mapping in procs.mappings(pid):
        if not mapping.inode or mapping.permissions[1] != "w" or mapping.permissions[3] != "s":
            continue
        name = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
        try:
            key = name.stat().st_dev, mapping.inode
            if key[0] in devices and key not in seen:
                seen.add(key)
                yield os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # unmapped while it runs: that has written it


def _fields(fdinfo: str) -> list[list[str]]:
    return [line.split() for line in fdinfo.splitlines()]
