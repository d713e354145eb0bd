"""Answers each line with its number on that connection; one thread per connection.

With ``--report`` it ends at the end of standard input and says how many lines it
answered, on how many connections, and the longest time without a line (ms).
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time


class Seen:
    """What all connections together have seen."""

    def __init__(self) -> None:
        self.lines = self.connections = 0
        self.gap = self.last = 0.0
        self._lock = threading.Lock()

    def connection(self) -> None:
        """One more."""
        with self._lock:
            self.connections += 1

    def line(self) -> None:
        """One more, now."""
        with self._lock:
            now = time.monotonic()
            if self.last:
                self.gap = max(self.gap, now - self.last)
            self.last = now
            self.lines += 1


SEEN = Seen()


class Connection(socketserver.StreamRequestHandler):
    """Counts its lines."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Until the client closes."""
        SEEN.connection()
        for number, line in enumerate(self.rfile, 1):
            self.wfile.write(b"%d %s" % (number, line))
            SEEN.line()


class Server(socketserver.ThreadingTCPServer):
    """Both address families."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """Also IPv4."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


if __name__ == "__main__":
    with Server(("::", 7000), Connection) as server:
        if "--report" not in sys.argv:
            server.serve_forever()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()
        print(
            json.dumps(
                {
                    "lines": SEEN.lines,
                    "connections": SEEN.connections,
                    "gap_ms": round(SEEN.gap * 1e3, 1),
                }
            )
        )
