"""Three downloads of ``/large`` at once, slowly. Standard library only.

``download.py ADDRESS PORT``. Prints ``ready`` when all are under way, and one JSON object at the
end, which comes when they are complete: ``digests`` (SHA-256), ``worst_ms`` (longest wait for the
next bytes) and ``error``.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time

COUNT, PIECE = 3, 1 << 16


class Download(threading.Thread):
    """One of them."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self.worst = 0.0
        self.error: str | None = None
        connection = socket.create_connection((address, port), 20)
        connection.settimeout(60)
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        self.answer = connection.makefile("rb")
        self.left = 0
        while (line := self.answer.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                self.left = int(value)

    def run(self) -> None:
        last = time.monotonic()
        try:
            while data := self.answer.read(min(PIECE, self.left)):
                self.worst, last = max(self.worst, time.monotonic() - last), time.monotonic()
                self.digest.update(data)
                self.left -= len(data)
                time.sleep(0.01)
            if self.left:
                self.error = f"{self.left} bytes have not come"
        except OSError as failure:
            self.error = f"{type(failure).__name__}: {failure}"


def main() -> int:
    """Command line entry."""
    downloads = [Download(sys.argv[1], int(sys.argv[2])) for _ in range(COUNT)]
    print("ready", flush=True)
    for one in downloads:
        one.start()
    for one in downloads:
        one.join()
    errors = [one.error for one in downloads if one.error]
    report = {
        "error": errors[0] if errors else None,
        "digests": [one.digest.hexdigest() for one in downloads],
        "worst_ms": round(max(one.worst for one in downloads) * 1e3, 1),
    }
    print(json.dumps(report), flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
