"""CRIU's page daemon: serves a restored process the pages that lie in the store.

It is started before the freeze; until a restore connects it needs no more than
the process tree and an inventory. Pages it has served are freed from the store.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from pathlib import Path

from godwit_agent.hostops import procs
from godwit_agent.hostops.criu import survive
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath
from godwit_api.errors import Aborted
from godwit_api.reasons import Reason

_READY_TIMEOUT_S = 5.0
_SOCKET = "lazy-pages.socket"  # criu/uffd.c: in the working directory of daemon and restore


class PageDaemon:
    """One daemon for one container: ``pages`` and ``work`` are host directories."""

    def __init__(self, layout: Layout, pages: HostPath, work: HostPath) -> None:
        self._layout = layout
        self._pages = pages
        self._work = work
        self._pid_file = layout.local(f"{pages}/daemon.pid")
        self._ended = layout.local(f"{pages}/ended")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it listens. ``Aborted(RestoreFailed)``."""
        self.stop()
        socket = self._layout.local(f"{self._work}/{_SOCKET}")
        socket.unlink(missing_ok=True)
        reader, writer = os.pipe()
        arguments = self._layout.command(
            *(self._layout.criu, "lazy-pages", "-D", self._pages, "-W", self._work),
            *("-o", "lazy.log", "-v1", "--status-fd", str(writer)),
        )
        self._ended.unlink(missing_ok=True)
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._layout.environment(GODWIT_PAGES=self._pages),  # criu-postcopy.c
                pass_fds=(writer,),
                start_new_session=True,
            )
            os.close(writer)
            writer = -1
            ready, _, _ = select.select([reader], [], [], _READY_TIMEOUT_S)
            if not ready or os.read(reader, 1) != b"\0":
                raise Aborted(Reason.RESTORE_FAILED, f"CRIU's page daemon: {self._words()}")
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        self._pid_file.write_text(str(self._process.pid))
        survive.detach(self._layout, self._process.pid)

    def drained(self, timeout_s: float) -> bool:
        """Whether it has ended, with every page handed over."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout_s) == 0
            return False
        deadline = time.monotonic() + timeout_s
        while self._former() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def pid(self) -> int | None:
        """While it runs, also when a former agent has started it."""
        if self._process is not None:
            return self._process.pid if self._process.poll() is None else None
        return self._former()

    def served(self) -> bool:
        """Of one that has ended: whether with every page handed over, or dropped."""
        if self._process is not None:
            return self._process.poll() == 0
        with contextlib.suppress(OSError):
            return self._ended.read_text() == "0\n"
        return False

    def stop(self) -> None:
        """Only when no process depends on it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        elif (pid := self._former()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._pid_file.unlink(missing_ok=True)

    def _former(self) -> int | None:
        """Process id of a daemon that a former agent had started for this directory."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._pid_file.read_text())
            if self._pages in procs.read(pid, "cmdline").split("\0"):
                return None if procs.is_zombie(pid) else pid
        return None

    def _words(self) -> str:
        path = Path(self._layout.local(f"{self._work}/lazy.log"))
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace")[-500:].strip() or "no reason given"
        return "no reason given"
