"""Writes each line that it is sent to files of a directory, in three ways, and reads it back.

``ledger.py DIRECTORY``: a line becomes ``NUMBER LINE`` and goes to ``appended`` (O_APPEND), to
``written`` (at the descriptor's own offset) and into a slot of ``mapped`` (shared memory map). The
answer is ``NUMBER LINE``, after it has been read back from the files. ``sync`` writes the map
back. Nothing else is ever flushed.
"""

from __future__ import annotations

import mmap
import os
import socketserver
import sys
import threading
from pathlib import Path

SLOT, SLOTS = 64, 1 << 16


class Ledger:
    """The files and how far they are."""

    def __init__(self, directory: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._append = os.open(directory / "appended", flags | os.O_APPEND, 0o644)
        self._written = os.open(directory / "written", flags, 0o644)
        self._reader = os.open(directory / "written", os.O_RDONLY)
        table = os.open(directory / "mapped", flags, 0o644)
        os.truncate(table, SLOT * SLOTS)
        self._map = mmap.mmap(table, SLOT * SLOTS)
        os.close(table)
        self._number = self._offset = 0
        self._lock = threading.Lock()

    def add(self, text: bytes) -> bytes:
        """``ValueError`` when something else is read than was written."""
        with self._lock:
            self._number += 1
            line = b"%d %s\n" % (self._number, text)
            for fd in (self._append, self._written):
                if os.write(fd, line) != len(line):
                    raise ValueError("short write")
            at = self._number * SLOT
            self._map[at : at + SLOT] = line[:SLOT].ljust(SLOT, b"\0")
            for fd in (self._append, self._reader):
                if (read := os.pread(fd, len(line), self._offset)) != line:
                    raise ValueError(f"{read!r} at {self._offset} where {line!r} was written")
            self._offset += len(line)
            for fd in (self._append, self._written):
                if (position := os.lseek(fd, 0, os.SEEK_CUR)) != self._offset:
                    raise ValueError(f"descriptor at {position} instead of {self._offset}")
            return line

    def sync(self) -> bytes:
        """The map has been written back."""
        with self._lock:
            self._map.flush()
            return b"synced %d\n" % self._number


class Connection(socketserver.StreamRequestHandler):
    """One client."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Until the client closes."""
        for line in self.rfile:
            text = line.rstrip(b"\n")
            try:
                self.wfile.write(LEDGER.sync() if text == b"sync" else LEDGER.add(text))
            except (OSError, ValueError) as failure:
                self.wfile.write(f"{type(failure).__name__}: {failure}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    """Many clients at once."""

    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    LEDGER = Ledger(Path(sys.argv[1]))
    with Server(("", 7000), Connection) as server:
        server.serve_forever()
