"""Counts as Redis does, outside the cluster: SET and INCR of one number per connection.

Says where it listens, then serves until standard input ends.
"""

from __future__ import annotations

import socketserver
import sys
import threading


class Connection(socketserver.StreamRequestHandler):
    """One client."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Until the client closes."""
        number = 0
        while words := self._command():
            if words[0] == b"INCR":
                number += 1
                self.wfile.write(b":%d\r\n" % number)
            else:
                number = int(words[2])
                self.wfile.write(b"+OK\r\n")

    def _command(self) -> list[bytes]:
        count = self.rfile.readline()
        if not count:
            return []
        words = []
        for _ in range(int(count[1:])):
            length = int(self.rfile.readline()[1:])
            words.append(self.rfile.read(length + 2)[:-2])
        return words


class Server(socketserver.ThreadingTCPServer):
    """A thread per connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    with Server((sys.argv[1], int(sys.argv[2])), Connection) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("ready", flush=True)
        sys.stdin.read()
        server.shutdown()
