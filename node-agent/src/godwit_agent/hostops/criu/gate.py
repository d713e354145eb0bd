"""The gate at which a started CRIU waits: files ``waiting``, ``gate``, ``abort`` of a directory.

See docs/architecture.md; ``godwit-hook`` is the other side.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from godwit_api.errors import Aborted
from godwit_api.reasons import Reason

_GO, _NO = b"g", b"x"
_OPEN_TIMEOUT_S = 2.0


class Gate:
    """``directory`` as this process opens it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self._directory / "gate", 0o600)

    def waiting(self) -> bool:
        return (self._directory / "waiting").exists()

    def open(self) -> None:
        """``Aborted(DumpFailed)`` when nobody waits any more."""
        if not self._tell(_GO, _OPEN_TIMEOUT_S):
            raise Aborted(Reason.DUMP_FAILED, f"nobody waits at the gate {self._directory}")

    def refuse(self) -> None:
        """Whoever waits or will come ends with an error."""
        if self._directory.is_dir():
            (self._directory / "abort").touch(mode=0o600)
            self._tell(_NO, 0.2)

    def _tell(self, word: bytes, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fd = os.open(self._directory / "gate", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                # ENXIO: the other side has announced itself but not opened the pipe yet
                if error.errno != errno.ENXIO or time.monotonic() > deadline:
                    return False
                time.sleep(0.0002)
                continue
            try:
                os.write(fd, word)
            except BrokenPipeError:
                return False
            finally:
                os.close(fd)
            return True
