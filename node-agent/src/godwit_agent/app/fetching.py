"""A target's copy that runs, or is about to, while pages of it are still on its source.

What processes wait for is fetched at once, over a connection of its own; once
the copy runs, the rest streams beside it in order. The source answers single
questions and remembers nothing, so either agent may be restarted at any time,
and a link may be cut: the processes that need a page wait as long as it takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from godwit_agent import log
from godwit_agent.app.model import Migration, PeerNode
from godwit_agent.app.peers import Peer, PeerFactory
from godwit_agent.hostops.model import Piece
from godwit_agent.hostops.ports import MissingPages, Serving
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

# One is on its way while the other is written. More would only queue on the link, where what a
# process waits for queues behind it.
_STREAMS = 2
_STREAM_BYTES = 512 << 10
_WAITING = 4
_LOOK_S = 1.0
_CALL_S = 10.0
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 1.0
_STOP_S = 15.0


class Fetching:
    """Ends by ``arrived`` or ``lost``, called until one of them does not raise, or by ``stop``.

    ``lost``: the pages will never come, or are lost here with the page daemon.
    """

    def __init__(
        self,
        migration: Migration,
        source: PeerNode,
        missing: MissingPages,
        peers: PeerFactory,
        *,
        arrived: Callable[[], None],
        lost: Callable[[GodwitError], None],
    ) -> None:
        self._migration = migration
        self._missing = missing
        self._arrived = arrived
        self._lost = lost
        self._peers = (peers(source), peers(source))
        self._over = threading.Event()
        self._running = threading.Event()
        self._fatal: GodwitError | None = None
        self._pieces: Iterator[Piece] = iter(())
        self._under_way: set[Piece] = set()
        self._lock = threading.Lock()
        self._warned = False
        self._threads = [threading.Thread(target=self._serve, name="fetch-wanted", daemon=True)]
        self._threads += [
            threading.Thread(target=self._stream, name="fetch-rest", daemon=True)
            for _ in range(_STREAMS)
        ]

    def start(self) -> None:
        """Before the restore, which may touch pages."""
        for thread in self._threads:
            thread.start()

    def run(self) -> None:
        """The copy runs: the rest may come, and what is lost now is lost for good."""
        self._running.set()

    def stop(self) -> None:
        """Returns when nothing of the store is used any more."""
        self._over.set()
        for peer in self._peers:
            peer.close()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))
        self._missing.let_go()

    def _serve(self) -> None:
        """Until every page is here, or will never be."""
        with ThreadPoolExecutor(_WAITING, thread_name_prefix="fetch") as workers:
            while not self._over.is_set():
                try:
                    self._missing.hold()
                    for piece in self._missing.wanted(_LOOK_S):
                        self._submit(workers, piece)
                    if self._running.is_set():
                        self._judge()
                except Exception as error:
                    self._warn(error)
                    self._over.wait(_MAX_DELAY_S)

    def _submit(self, workers: ThreadPoolExecutor, piece: Piece) -> None:
        with self._lock:
            if piece in self._under_way:
                return
            self._under_way.add(piece)
        workers.submit(self._fetch_wanted, piece)

    def _fetch_wanted(self, piece: Piece) -> None:
        self._fetch(self._peers[0], piece)
        with self._lock:
            self._under_way.discard(piece)

    def _judge(self) -> None:
        serving = self._missing.serving()
        if self._fatal or serving is Serving.BROKEN:
            self._lost(self._fatal or _broken())
            self._over.set()
        elif not self._missing.bytes or serving is Serving.ENDED:
            self._arrived()
            self._over.set()

    def _stream(self) -> None:
        while not self._over.is_set():
            if not self._running.wait(_LOOK_S):
                continue
            with self._lock:
                piece = next(self._pieces, None)
                if piece is None:
                    self._pieces = self._missing.pieces(_STREAM_BYTES)
                    piece = next(self._pieces, None)
            if piece is None:
                return
            self._fetch(self._peers[1], piece)

    def _fetch(self, peer: Peer, piece: Piece) -> None:
        """Repeated until it is here."""
        delay = _FIRST_DELAY_S
        while not self._over.is_set():
            try:
                extents = peer.pages(self._migration, piece, _CALL_S)
                if not self._over.is_set():
                    self._missing.arrived(piece, extents)
                return
            except Exception as error:
                gone = isinstance(error, GodwitError) and error.reason is Reason.SOURCE_EXITED
                if isinstance(error, GodwitError) and gone and self._running.is_set():
                    self._fatal = error
                    return
                if not self._over.is_set():
                    self._warn(error)
            self._over.wait(delay)
            delay = min(delay * 2, _MAX_DELAY_S)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("pages do not come yet", **self._migration.keys, error=error)


def _broken() -> GodwitError:
    return Rejected(Reason.RESTORE_FAILED, "the page daemon has died with pages it had to serve")
