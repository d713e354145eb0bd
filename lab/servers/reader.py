"""Reads numbered lines of a file that grows; a gap or a repetition ends it.

``reader.py FILE SEEN [MODE]``: how many came goes to the file SEEN. Port 7000 is open when it
reads. MODE: of open(), ``r+b`` if it is not given.

A client of NFS that reads while the file grows may for a while see zeros where the new lines
are: it learns the size with the answer that has the old content. They are read again. One that
has the file open for writing, too, believes in its own content for as long (fs/nfs/inode.c,
nfs_update_inode).
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path


def follow(log: Path, seen: Path, mode: str = "r+b") -> None:
    """Never returns."""
    while not log.exists():
        time.sleep(0.1)
    with open(log, mode, buffering=0) as file, socket.create_server(("", 7000)) as server:
        threading.Thread(target=greet, args=(server,), daemon=True).start()
        count, rest = 0, b""
        while True:
            at = file.tell()
            there = file.read(1 << 16)
            known = there.partition(b"\0")[0]
            file.seek(at + len(known))
            if not known:
                time.sleep(0.02)
                continue
            *lines, rest = (rest + known).split(b"\n")
            for line in lines:
                count += 1
                if int(line) != count:
                    raise SystemExit(f"line {line!r} where {count} was expected")
            seen.write_text(str(count))


def greet(server: socket.socket) -> None:
    """Never returns."""
    while True:
        server.accept()[0].close()


if __name__ == "__main__":
    follow(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
