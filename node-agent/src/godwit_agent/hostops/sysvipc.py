"""/proc/sysvipc, as the processes of another IPC namespace read it (ipc/util.c: the files tell of
the namespace of who opens them)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

_CLONE_NEWIPC = 0x08000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def objects(pid: int, *kinds: str) -> dict[str, list[str]]:
    """By kind (``shm``, ``sem``, ``msg``) a line for each object; no kind that cannot be read,
    and nothing of a process that has gone."""
    found: dict[str, list[str]] = {}

    def look() -> None:
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, _CLONE_NEWIPC):
                    return
            finally:
                os.close(fd)
            for kind in kinds:
                with contextlib.suppress(OSError):
                    found[kind] = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]

    # setns concerns the calling thread only: one that ends
    thread = threading.Thread(target=look, name="ipc", daemon=True)
    thread.start()
    thread.join()
    return found
