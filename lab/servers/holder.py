"""Holds what does not move on a network file system, and waits.

``holder.py DIRECTORY KIND …``: ``locked`` (fcntl), ``flocked``, ``removed`` (open, without a
name) or ``open``, each a file of that name. Port 7000 is open when it holds them.
"""

from __future__ import annotations

import fcntl
import socket
import sys
from contextlib import ExitStack
from pathlib import Path


def hold(directory: Path, kinds: list[str]) -> None:
    """Never returns."""
    with ExitStack() as stack:
        for kind in kinds:
            file = stack.enter_context((directory / kind).open("w"))
            if kind == "locked":
                fcntl.lockf(file, fcntl.LOCK_EX)
            elif kind == "flocked":
                fcntl.flock(file, fcntl.LOCK_EX)
            elif kind == "removed":
                (directory / kind).unlink()
        server = stack.enter_context(socket.create_server(("", 7000)))
        while True:
            server.accept()[0].close()


if __name__ == "__main__":
    hold(Path(sys.argv[1]), sys.argv[2:])
