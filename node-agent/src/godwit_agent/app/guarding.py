"""Guards live as long as their migration: written once, renewed by a thread."""

from __future__ import annotations

import threading
import time

from godwit_agent import log
from godwit_agent.app.journal import JournalStore
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.sessions import SourceSession
from godwit_agent.hostops.ports import Host
from godwit_api.errors import GodwitError


class Guards:
    """Renews every guard file that lies on this node, long before its deadline.

    A guard belongs to the containers, not to an attempt: it stays when an
    attempt is given up for the next one. So what is renewed is what is there;
    only ``lift`` ends it. One whose migration is over or unknown here is left to
    its deadline.
    """

    def __init__(self, host: Host, journals: JournalStore, seconds: int) -> None:
        self._host = host
        self._journals = journals
        self._seconds = seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="guards", daemon=True)

    def start(self) -> None:
        self._try_renew()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def guard(self, session: SourceSession) -> None:
        with self._lock:
            session.processes.guard(session.migration.epoch, self._deadline())

    def lift(self, processes: Leaving, *, back: bool) -> None:
        with self._lock:
            processes.lift_guard(back=back)

    def renew(self) -> None:
        live = self._journals.live()
        with self._lock:
            for guard in self._host.hooks.guards():
                if guard.migration not in live:
                    continue
                self._host.hooks.guard(
                    (guard.container_id,), guard.migration, guard.epoch, self._deadline()
                )

    def _run(self) -> None:
        while not self._stop.wait(self._seconds / 10):
            self._try_renew()

    def _try_renew(self) -> None:
        try:
            self.renew()
        except (GodwitError, OSError) as error:
            log.error("guards were not renewed", error=error)

    def _deadline(self) -> int:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME)) + self._seconds
