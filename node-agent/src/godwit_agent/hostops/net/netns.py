"""Threads that live in a network namespace. No process is forked for it.

``setns`` concerns the calling thread only, so such a thread runs nothing but
what is handed to it here and never goes back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCSIFFLAGS = 0x8914  # linux/sockios.h
_IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)


class NetnsThread:
    """Runs functions in a network namespace: of a file, a new private one, or our own.

    A new one has only its loopback interface, up, and is gone with its last user.
    """

    def __init__(self, path: str | None = None, *, private: bool = False) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._tid = 0
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(path, private, ready), name="netns", daemon=True
        )
        self._thread.start()
        try:
            ready.result()
        except OSError as error:
            raise Retryable(Reason.INTERNAL, f"network namespace {path}: {error}") from error

    @property
    def path(self) -> str:
        """Names the namespace for other processes that see our process ids; while it runs."""
        return f"/proc/{os.getpid()}/task/{self._tid}/ns/net"

    def call(self, function: Callable[[], T]) -> T:
        """Result or exception of ``function``, run there."""
        future: Future[T] = Future()
        self._work.put((future, function))
        return future.result()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self, path: str | None, private: bool, ready: Future[None]) -> None:
        try:
            self._tid = threading.get_native_id()
            if private:
                _check(_libc.unshare(_CLONE_NEWNET), "unshare")
                _loopback_up()
            elif path is not None:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    _check(_libc.setns(fd, _CLONE_NEWNET), f"setns {path}")
                finally:
                    os.close(fd)
        except OSError as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while (item := self._work.get()) is not None:
            future, function = item
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del future, function, item


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", _IFF_UP)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)
