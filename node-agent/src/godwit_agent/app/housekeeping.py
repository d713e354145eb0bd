"""Removes what belongs to nobody: leftovers of a crash, and journals nobody will ask for."""

from __future__ import annotations

import threading
import time
from collections.abc import Set as AbstractSet

from godwit_agent import log
from godwit_agent.app.journal import JournalStore
from godwit_agent.hostops.ports import Host
from godwit_api.errors import GodwitError

_EVERY_S = 600.0
_MARK_S = 3600.0
"""The kubelet may be about to make the sandbox of a pod whose deletion it has not heard of yet."""


class Housekeeping:
    """Looks at start, after recovery, and every ten minutes. The journals say what lives."""

    def __init__(self, host: Host, journals: JournalStore, keep_hours: int) -> None:
        self._host = host
        self._journals = journals
        self._keep_s = keep_hours * 3600
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def sweep(self) -> None:
        """Stores, expectations and guards whose migration has no living journal here."""
        known = {key.uid for key in self._journals.attempts()}
        live = self._journals.live()
        for uid in self._host.stores.list():
            if uid not in live:
                self._host.stores.destroy(uid)
                log.info("store of no migration removed", uid=uid)
        for pod_uid, migration in self._host.hooks.expected().items():
            if migration not in live:
                self._host.hooks.unexpect(pod_uid, ran=False)
                log.info("expectation of no migration removed", uid=migration, pod_uid=pod_uid)
        self._unmark(live)
        for guard in self._host.hooks.guards():
            # an unknown guard is not ours to judge: it ends by its deadline, not renewed
            if guard.migration in known and guard.migration not in live:
                self._host.hooks.unguard((guard.container_id,))
                log.info("guard of no migration removed", uid=guard.migration)

    def _unmark(self, live: AbstractSet[str]) -> None:
        """Successors that never ran, and that the kubelet cannot start any more: it has taken
        down the sandbox, which it keeps as long as it knows of the pod."""
        here = set(self._host.pods.list())
        for mark in self._host.hooks.marks():
            old = mark.age_s > _MARK_S
            if old and mark.migration not in live and mark.pod_uid not in here:
                self._host.hooks.unmark(mark.pod_uid)

    def forget_old(self) -> None:
        """Journals that have been over for long; repeated calls are not expected any more."""
        live = self._journals.live()
        for uid in {key.uid for key in self._journals.attempts()} - live:
            journals = list(self._journals.readable(uid))
            newest = max((j.records[-1].at for j in journals if j.records), default=0.0)
            if time.time() - newest > self._keep_s:
                self._journals.forget(uid)

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            try:
                self.sweep()
                self.forget_old()
            except (GodwitError, OSError) as error:
                log.error("housekeeping failed", error=error)
