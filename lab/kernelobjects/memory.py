"""Memory of all kinds, and System V objects."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import socket
from pathlib import Path

from .checks import Check, Unavailable, check, libc, same, system
from .processes import ask, child, field, said

_IPC_PRIVATE, _IPC_RMID, _IPC_CREAT = 0, 0, 0o1000
_SIZE = 8 << 20


def _noise(size: int, seed: int) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def _digest(area: object) -> str:
    return hashlib.sha256(bytes(area)).hexdigest()  # type: ignore[call-overload]


@check
def private_memory() -> Check:
    area = mmap.mmap(-1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = _noise(_SIZE, 1)
    digest = _digest(area)
    while True:
        yield
        same(_digest(area), digest)


@check
def locked_memory() -> Check:
    """mlock, as databases and programs that keep secrets do it."""
    area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = _noise(1 << 20, 7)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    try:
        system(libc.mlock(start, 1 << 20), "mlock")
    except OSError as error:
        raise Unavailable(str(error)) from error
    digest = _digest(area)
    while True:
        yield
        same(_digest(area), digest)
        same(field("VmLck"), "1024 kB", "locked")


@check
def state_of_the_random_generator() -> Check:
    """glibc keeps it in memory that the kernel may empty (MAP_DROPPABLE)."""
    libc.getrandom.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    data = ctypes.create_string_buffer(64)
    seen = set()
    while True:
        for _ in range(100):
            same(libc.getrandom(data, 64, 0), 64)
            seen.add(data.raw)
        same(len(seen) % 100, 0, "different numbers")
        yield


@check
def copied_on_write_with_a_child() -> Check:
    """Both hold the same pages until one writes; neither sees the other's writes."""
    area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = _noise(1 << 20, 2)
    digest = _digest(area)
    _, peer = child(ask(lambda: _digest(area)))
    area[:4] = b"mine"
    mine = _digest(area)
    while True:
        yield
        same((said(peer), _digest(area)), (digest, mine))


@check
def shared_memory_with_a_child() -> Check:
    area = mmap.mmap(-1, _SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    area[:] = _noise(_SIZE, 3)

    def answer() -> object:
        area[0] = (area[0] + 1) % 256
        return _digest(area)

    _, peer = child(ask(answer))
    while True:
        yield
        before = area[0]
        same(said(peer), _digest(area), "what both see")
        same(area[0], (before + 1) % 256, "written by the child")


@check
def sparse_shared_memory() -> Check:
    area = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    area[700 << 20 : (700 << 20) + 5] = b"there"
    while True:
        yield
        same(area[700 << 20 : (700 << 20) + 5], b"there")
        same(area[300 << 20 : (300 << 20) + 5], bytes(5))


@check
def memfd() -> Check:
    fd = os.memfd_create("kernelobjects", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, _noise(1 << 20, 4))
    import fcntl

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    area = mmap.mmap(fd, 1 << 20)
    digest = _digest(area)
    while True:
        yield
        same(_digest(area), digest)
        same(hashlib.sha256(os.pread(fd, 1 << 20, 0)).hexdigest(), digest, "read")
        same(fcntl.fcntl(fd, fcntl.F_GET_SEALS), fcntl.F_SEAL_SHRINK, "seals")


@check
def system_v_shared_memory() -> Check:
    libc.shmat.restype = ctypes.c_void_p
    number = system(libc.shmget(0x60D, 1 << 20, _IPC_CREAT | 0o600), "shmget")
    address = libc.shmat(number, None, 0)
    content = _noise(1 << 20, 5)
    ctypes.memmove(address, content, len(content))

    def answer() -> object:
        other = libc.shmat(system(libc.shmget(0x60D, 0, 0), "shmget"), None, 0)
        data = ctypes.string_at(other, 1 << 20)
        libc.shmdt(ctypes.c_void_p(other))
        return hashlib.sha256(data).hexdigest()

    _, peer = child(ask(answer))
    while True:
        yield
        same(ctypes.string_at(address, 1 << 20) == content, True, "attached memory")
        same(said(peer), hashlib.sha256(content).hexdigest(), "found by its key")
        same(libc.shmget(0x60D, 0, 0), number, "identifier")


@check
def system_v_shared_memory_marked_for_removal() -> Check:
    """As PostgreSQL and others use it: removed already, alive while somebody is attached."""
    libc.shmat.restype = ctypes.c_void_p
    number = system(libc.shmget(_IPC_PRIVATE, 1 << 16, 0o600), "shmget")
    address = libc.shmat(number, None, 0)
    ctypes.memmove(address, b"attached", 8)
    system(libc.shmctl(number, _IPC_RMID, None), "shmctl")
    while True:
        yield
        same(ctypes.string_at(address, 8), b"attached")


@check
def system_v_semaphores() -> Check:
    number = system(libc.semget(0x60D, 3, _IPC_CREAT | 0o600), "semget")
    values = (ctypes.c_ushort * 3)(4, 5, 6)
    system(libc.semctl(number, 0, 17, values), "SETALL")
    while True:
        yield
        same(libc.semget(0x60D, 0, 0), number, "identifier")
        same([libc.semctl(number, index, 12) for index in range(3)], [4, 5, 6])  # GETVAL


class _Message(ctypes.Structure):
    _fields_ = (("mtype", ctypes.c_long), ("mtext", ctypes.c_char * 16))


@check
def system_v_messages() -> Check:
    number = system(libc.msgget(0x60D, _IPC_CREAT | 0o600), "msgget")
    message = _Message(9, b"queued")
    system(libc.msgsnd(number, ctypes.byref(message), 6, 0), "msgsnd")
    while True:
        yield
        got = _Message()
        system(libc.msgrcv(number, ctypes.byref(got), 16, 9, 0o4000), "msgrcv")
        same(got.mtext, b"queued")
        system(libc.msgsnd(number, ctypes.byref(message), 6, 0), "msgsnd")


@check
def file_in_dev_shm() -> Check:
    path = Path("/dev/shm/kernelobjects")
    path.write_bytes(_noise(1 << 20, 6))
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    digest = _digest(area)
    while True:
        yield
        same(_digest(area), digest, "mapped")
        same(hashlib.sha256(path.read_bytes()).hexdigest(), digest, "read")
        area[0] ^= 1
        digest = _digest(area)


@check
def protections_of_memory() -> Check:
    """Maps with holes, guard pages and read-only pages look the same afterwards."""
    area = mmap.mmap(-1, 64 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    system(libc.mprotect(start + (8 << 12), 4 << 12, 0), "mprotect")
    system(libc.mprotect(start + (20 << 12), 4 << 12, mmap.PROT_READ), "mprotect")

    def picture() -> list[str]:
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            ends = [int(text, 16) for text in line.split()[0].split("-")]
            if ends[0] < start + (64 << 12) and ends[1] > start:
                low, high = max(ends[0], start), min(ends[1], start + (64 << 12))
                found.append(f"{low - start:x}-{high - start:x} {line.split()[1]}")
        return found

    former = picture()
    same(len(former) >= 5, True, f"{former}")
    while True:
        yield
        same(picture(), former)


@check
def memory_advice() -> Check:
    """MADV_DONTFORK keeps a range from children; CRIU must find and restore it."""
    area = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:4] = b"mine"
    area.madvise(mmap.MADV_DONTFORK)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    while True:
        yield
        same(bytes(area[:4]), b"mine")
        here, there = socket.socketpair()
        pid = os.fork()
        if not pid:
            maps = Path("/proc/self/maps").read_text()
            there.sendall(b"y" if f"{start:x}-" in maps else b"n")
            os._exit(0)
        os.waitpid(pid, 0)
        same(here.recv(1), b"n", "visible in a child")
