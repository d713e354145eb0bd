"""Shared memory of one container on the target: each object a memfd that becomes the process's own.

CRIU's restore asks for it (criu-shared.c) and takes it in place of the empty
one it has made. Until then this agent holds it, and nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from godwit_agent import log
from godwit_agent.hostops.filerecords import Record
from godwit_agent.hostops.pages import charging
from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.hostops.pages.sharedmemory import SHARED, About
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted, Rejected
from godwit_api.reasons import Reason

_SOCKET = "shared.sock"
_IMAGE = re.compile(r"pagemap-shmem-(\d+)\.img\Z")
_ASKED = struct.Struct("=Q")
_ANSWER = struct.Struct("=QQ")
_TIMEOUT_S = 5.0
_MAX_NAME = 249  # memfd_create(2)
_MAX_BYTES = 1 << 52
_decoder = msgspec.msgpack.Decoder(About)


@dataclass(slots=True)
class _Object:
    about: About
    fd: int
    size: int
    charged: bool = False


class SharedStore(PageStore):
    """``images``: where CRIU's images lie, and the socket at which a restore asks."""

    def __init__(self, images: Path) -> None:
        super().__init__(images, reopen=False)  # nothing of it is ever missing
        self._images = images
        self._objects: dict[int, _Object] = {}
        self._by_number: dict[int, _Object] = {}
        self._given: set[int] = set()
        self._retired: list[int] = []
        self._complete, self._total = False, 0
        self._server: socket.socket | None = None

    def write(self, vpid: int, vaddr: int, data: memoryview) -> None:
        self._require_incomplete()
        super().write(vpid, vaddr, data)

    def zero(self, vpid: int, vaddr: int, length: int) -> None:
        self._require_incomplete()
        super().zero(vpid, vaddr, length)

    def announce(self, record: Record, body: memoryview) -> None:
        """An object, before its pages; again in the freeze, with the size that counts."""
        self._require_incomplete()
        try:
            about = _decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise Rejected(Reason.MALFORMED, f"shared memory: {error}") from error
        index = record.number
        wrong = len(about.name) > _MAX_NAME or b"\0" in about.name or about.number < 0
        if wrong or not 0 < index < SHARED or record.size > _MAX_BYTES:
            raise Rejected(Reason.MALFORMED, f"shared memory {index} has a wrong form")
        for former in [i for i, one in self._objects.items() if one.about.copy != about.copy]:
            self._drop(former)
        known = self._objects.get(index)
        if about.gone:
            self._drop(index)
        elif known is None:
            self._objects[index] = _Object(about, self._make(about), record.size)
        elif known.about != about:
            raise Rejected(Reason.MALFORMED, f"shared memory {index} has become another one")
        else:
            known.size = record.size

    def charge(self, place: Path, available: int) -> None:
        """From now on it counts as memory of the cgroup ``place`` (``charging``), as far as there
        is room for a second copy of one object. While no pages come."""
        for index, one in () if self._complete else self._objects.items():
            size, used = os.fstat(one.fd).st_size, os.fstat(one.fd).st_blocks * 512
            if one.charged or not used or used > available // 2 or one.about.sysv:
                continue
            fd, process = self._make(one.about), self._process(SHARED | index)
            writes = process.writes
            try:
                os.ftruncate(fd, size)
                if not charging.copy_within(place, one.fd, fd, size):
                    log.warning("shared memory stays the agent's", number=one.about.number)
                    continue
                with process.lock:
                    if process.writes == writes:
                        os.dup2(fd, process.fd, inheritable=False)
                        os.dup2(fd, one.fd, inheritable=False)
                        one.charged = True
            finally:
                os.close(fd)

    def complete_all(self) -> int:
        """Every object has its size and every page of it. Bytes. ``Aborted(VerifyFailed)``."""
        if self._complete:
            return self._total
        total = 0
        self._by_number.clear()
        for index, one in self._objects.items():
            process = self._process(SHARED | index)
            if process.there is None:
                message = f"shared memory {one.about.number}: nothing is known of its content"
                raise Aborted(Reason.VERIFY_FAILED, message)
            for start, end in process.there:
                missing = process.have.first_missing(start, end)
                if missing is not None or end > -(-one.size // PAGE) * PAGE:
                    message = f"shared memory {one.about.number}: a page of {start:#x} is not here"
                    raise Aborted(Reason.VERIFY_FAILED, message)
                total += end - start
            os.ftruncate(one.fd, one.size)
            self._by_number[one.about.number] = one
        if len(self._by_number) != len(self._objects):
            raise Aborted(Reason.VERIFY_FAILED, "two objects of shared memory have one number")
        self._complete, self._total = True, total
        if self._objects:
            self.listen()
        return total

    def listen(self) -> None:
        """From now on a restore that asks is answered. Nobody asks where no socket is."""
        if self._server is not None or not self._objects:
            return
        directory = os.open(self._images, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_SOCKET, dir_fd=directory)
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # the store's own path is longer than a socket's may be
            server.bind(f"/proc/self/fd/{directory}/{_SOCKET}")
            server.listen(64)
        finally:
            os.close(directory)
        self._server = server
        threading.Thread(target=self._serve, args=(server,), name="shared", daemon=True).start()

    def require_given(self) -> None:
        """After a restore: CRIU has taken every object it has a page map of, or the copy lacks
        its content. ``Aborted(VerifyFailed)``."""
        for path in self._images.iterdir():
            match = _IMAGE.match(path.name)
            if match and int(match[1]) in self._by_number and int(match[1]) not in self._given:
                message = f"shared memory {match[1]} has not been taken by the restore"
                raise Aborted(Reason.VERIFY_FAILED, message)

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        # no more than closed: they may be the memory of a process by now
        super().close()
        self._retired += (one.fd for one in self._objects.values())
        self._objects.clear()
        while self._retired:
            os.close(self._retired.pop())

    @staticmethod
    def _make(about: About) -> int:
        flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if about.sealable else 0)
        return os.memfd_create(os.fsdecode(about.name), flags)

    def _open(self, vpid: int) -> int:
        one = self._objects.get(vpid & ~SHARED)
        if one is None:
            raise Rejected(Reason.MALFORMED, f"shared memory {vpid & ~SHARED} is not announced")
        return os.dup(one.fd)

    def _require_incomplete(self) -> None:
        """What is complete may be the memory of a process already, and is only its own then."""
        if self._complete:
            raise Rejected(Reason.WRONG_STEP, "shared memory that is complete takes nothing more")

    def _drop(self, index: int) -> None:
        one = self._objects.pop(index, None)
        if one is not None:
            # not closed: a connection that has not ended may be writing to that number
            process = self.forget(SHARED | index)
            self._retired += (one.fd, *((process.fd,) if process else ()))
            os.ftruncate(one.fd, 0)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(_TIMEOUT_S)
                self._answer(peer)

    def _answer(self, peer: socket.socket) -> None:
        data = peer.recv(_ASKED.size, socket.MSG_WAITALL)
        if len(data) != _ASKED.size or not self._complete:
            return  # a restore that comes too early fails
        (number,) = _ASKED.unpack(data)
        one = self._by_number.get(number)
        if one is None:
            peer.sendall(_ANSWER.pack(0, 0))
            return
        socket.send_fds(peer, [_ANSWER.pack(1, one.size)], [one.fd])
        self._given.add(number)
