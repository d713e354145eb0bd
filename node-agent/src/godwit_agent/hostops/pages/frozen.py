"""Memory of a pod that stands frozen on its source, for a target that runs without all of it."""

from __future__ import annotations

import os
import threading

from godwit_agent.hostops import procs
from godwit_agent.hostops.model import Extent, Piece, PodState
from godwit_agent.hostops.pages.memory import deliver
from godwit_agent.hostops.ports import Cgroups
from godwit_api.errors import Rejected, Retryable
from godwit_api.reasons import Reason

_STANDING = {"t", "T", "Z", "X"}


class HostFrozenMemory:
    """The real ``FrozenMemory``. CRIU holds the processes; their memory is read past it."""

    def __init__(self, pod: PodState, cgroups: Cgroups) -> None:
        self._containers = {one.name: one for one in pod.containers}
        self._cgroups = cgroups
        self._open: dict[tuple[str, int], tuple[int, int]] = {}  # (pid, its memory)
        self._lock = threading.Lock()

    def read(self, piece: Piece) -> list[Extent]:
        """``Rejected(SourceExited)`` when the process is not there, or not frozen, any more."""
        container, vpid = piece.container, piece.vpid
        fd, collected = self._memory(container, vpid), _Extents()
        view = memoryview(bytearray(max((end - start for start, end in piece.ranges), default=0)))
        for start, end in piece.ranges:
            try:
                got = os.preadv(fd, [view[: end - start]], start)
            except OSError as error:
                message = f"process {vpid} of container {container}: {error} at {start:#x}"
                raise Retryable(Reason.COPY_FAILED, message) from error
            if got != end - start:
                raise _gone(container, vpid)  # its address space has ended
            deliver(collected, container, vpid, start, view[:got])
        return collected.found

    def close(self) -> None:
        with self._lock:
            for _, fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _memory(self, name: str, vpid: int) -> int:
        container = self._containers.get(name)
        if container is None:
            raise Rejected(Reason.MALFORMED, f"container {name!r} is not of this pod")
        with self._lock:
            found = self._open.get((name, vpid))
            if found is None:
                found = self._open[name, vpid] = self._find(container.id, name, vpid)
        pid, fd = found
        # CRIU, which holds them, has thawed their cgroup (criu/seize.c)
        running = procs.states(pid) - _STANDING
        if running and not self._cgroups.frozen(container.id):
            raise _gone(name, vpid)
        return fd

    def _find(self, container_id: str, name: str, vpid: int) -> tuple[int, int]:
        """Only among those in the guard's cgroup: numbers in a journal may be others' today."""
        for pid in self._cgroups.pids(container_id):
            if procs.vpid(pid) == vpid:
                try:
                    return pid, os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise _gone(name, vpid) from error
        raise _gone(name, vpid)


class _Extents:
    """``CopySink`` of pages that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[Extent] = []

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self.found.append(Extent(vaddr, len(data), bytes(data)))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self.found.append(Extent(vaddr, length, b""))

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        raise AssertionError("no files here")


def _gone(name: str, vpid: int) -> Rejected:
    message = f"process {vpid} of container {name} no longer stands frozen on the source"
    return Rejected(Reason.SOURCE_EXITED, message)
