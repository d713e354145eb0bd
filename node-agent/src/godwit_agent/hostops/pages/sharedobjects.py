"""Shared memory that processes have: memfds, anonymous shared mappings, SysV segments.

All three are files of one mount that the kernel keeps for itself (mm/shmem.c,
``shm_mnt``); a device number tells them from files of tmpfs mounts, huge pages
from both. CRIU names each by its inode, of which a SysV segment's is its
identifier (ipc/shm.c), and cannot tell two of the same number apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from godwit_agent.hostops import procs, sysvipc

_MEMFD, _SYSV = "/memfd:", "/SYSV"
_NAMES = (_MEMFD, _SYSV, "/dev/zero")
_DELETED = " (deleted)"
_GET_SEALS = 1034  # linux/fcntl.h
_SEAL_SEAL = 1
_MOST = 1 << 32  # CRIU keeps 32 bits of an inode's number


@dataclass(frozen=True, slots=True)
class Found:
    """One object and a path of ``/proc`` that opens it; ``number`` is CRIU's name for it."""

    device: int
    number: int
    path: str
    name: str
    sysv: bool

    @property
    def key(self) -> tuple[int, int, bool]:
        return self.device, self.number, self.sysv


def of(pids: Iterable[int]) -> tuple[Found, ...]:
    """All objects that the processes have open or mapped."""
    found: dict[tuple[int, int, bool], Found] = {}
    looked: set[tuple[str, int]] = set()
    for pid in pids:
        for one in (*_mapped(pid, looked), *_open(pid)):
            found.setdefault(one.key, one)
    return tuple(found.values())


def segments(pid: int) -> dict[int, int]:
    """Identifiers of all SysV segments that the process could attach, and the bytes they hold;
    also of those that nobody has attached. Empty when it has gone."""
    with contextlib.suppress(ValueError):
        lines = [line.split() for line in sysvipc.objects(pid, "shm").get("shm", ())]
        return {int(line[1]): sum(map(int, line[-2:])) for line in lines}
    return {}


def without_twins(found: Iterable[Found]) -> tuple[Found, ...]:
    """Those whose number is theirs alone."""
    found = tuple(found)
    numbers = [one.number for one in found]
    return tuple(one for one in found if one.number < _MOST and numbers.count(one.number) == 1)


def used_bytes(found: Iterable[Found]) -> int:
    """Memory that the objects hold."""
    total = 0
    for one in found:
        with contextlib.suppress(OSError):
            total += Path(one.path).stat().st_blocks * 512
    return total


def sealable(fd: int) -> bool:
    """Whether a memfd was made with MFD_ALLOW_SEALING, as CRIU tells it (criu/memfd.c)."""
    return fcntl.fcntl(fd, _GET_SEALS) != _SEAL_SEAL


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Parts of the file that are not holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:  # no more data, or cut off since
            return
        yield start, end
        at = end


def _mapped(pid: int, looked: set[tuple[str, int]]) -> Iterator[Found]:
    for item in procs.mappings(pid):
        if item.name.startswith(_NAMES) and (item.name, item.inode) not in looked:
            path = f"/proc/{pid}/map_files/{item.start:x}-{item.end:x}"
            if (one := _look(path)) is not None:
                looked.add((item.name, item.inode))
                yield one


def _open(pid: int) -> Iterator[Found]:
    for number, target in procs.descriptors(pid):
        if target.startswith(_MEMFD) and (one := _look(f"/proc/{pid}/fd/{number}")) is not None:
            yield one


def _look(path: str) -> Found | None:
    """None for a file of another mount, or of a process that has gone."""
    try:
        about, target = Path(path).stat(), os.readlink(path)
    except OSError:
        return None
    if about.st_dev != _device() or not stat.S_ISREG(about.st_mode):
        return None
    name = target.removesuffix(_DELETED)
    sysv = name.startswith(_SYSV)
    return Found(about.st_dev, about.st_ino, path, name.removeprefix(_MEMFD), sysv)


@functools.cache
def _device() -> int:
    fd = os.memfd_create("godwit-probe")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
