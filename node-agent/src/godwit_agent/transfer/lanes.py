"""Several connections at once: each has a thread that compresses and encrypts pages.

One thread reads the process; what it has read is copied into one of a few
buffers, and whichever lane is free takes it. A round is in the target's store
when the lanes are idle and every connection has been synced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from godwit_agent.transfer.connection import Connection
from godwit_agent.transfer.frames import Packed, Pages
from godwit_agent.transfer.packing import Packer
from godwit_api.errors import GodwitError, Retryable
from godwit_api.reasons import Reason

PIECE_BYTES = 1 << 20
_BUFFERS_PER_LANE = 2


class Lanes:
    """Threads over ``connections``. ``carried`` hears how many bytes of pages were sent."""

    def __init__(
        self, connections: list[Connection], *, pack: bool, carried: Callable[[int], None]
    ) -> None:
        self._carried = carried
        self._work: SimpleQueue[tuple[Pages, bytearray, int] | None] = SimpleQueue()
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._count = len(connections) * _BUFFERS_PER_LANE
        for _ in range(self._count):
            self._free.put(bytearray(PIECE_BYTES))
        self._failure: GodwitError | None = None
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(connection, Packer() if pack else None),
                name=f"lane-{number}",
                daemon=True,
            )
            for number, connection in enumerate(connections)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, head: Pages, data: memoryview) -> None:
        """At most ``PIECE_BYTES``. Waits for a buffer; raises what a lane has met before."""
        buffer = self._free.get()
        if self._failure:
            self._free.put(buffer)
            raise self._failure
        buffer[: len(data)] = data
        self._work.put((head, buffer, len(data)))

    def settle(self) -> None:
        """Returns when every piece was handed to its connection; raises if one was not."""
        for buffer in [self._free.get() for _ in range(self._count)]:
            self._free.put(buffer)
        if self._failure:
            raise self._failure

    @property
    def idle(self) -> bool:
        return self._free.qsize() == self._count

    def stop(self) -> None:
        """Ends the threads; a send that blocks must have been made to fail before."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, connection: Connection, packer: Packer | None) -> None:
        while (piece := self._work.get()) is not None:
            head, buffer, length = piece
            try:
                if self._failure is None:
                    self._carried(carry(connection, packer, head, memoryview(buffer)[:length]))
            except GodwitError as error:
                self._failure = self._failure or error
            except Exception as error:
                message = f"transfer stream: {type(error).__name__}: {error}"
                self._failure = self._failure or Retryable(Reason.TRANSFER_FAILED, message)
            finally:
                self._free.put(buffer)


def carry(connection: Connection, packer: Packer | None, head: Pages, data: memoryview) -> int:
    """Sends pages, packed where that is worth it; the bytes of the body."""
    packed = packer.pack(data) if packer else None
    if packed is None:
        connection.send(head, data)
        return len(data)
    connection.send(Packed(head.container, head.vpid, head.vaddr, len(data)), packed)
    return len(packed)
