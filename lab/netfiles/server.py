"""Serves SFTP on a TCP port, one ``sftp-server`` per connection; ``sshfs -o directport`` is its
client. Without ssh: the lab has no secrets to keep, and nothing else of the protocol changes.

``server.py PORT MILLISECONDS``: the server is that far away: what a client sends is served so
much later.
"""

from __future__ import annotations

import queue
import socket
import socketserver
import subprocess
import sys
import threading
import time

SFTP = "/usr/lib/openssh/sftp-server"


class Connection(socketserver.BaseRequestHandler):
    """One client, for as long as it has the file system mounted."""

    def handle(self) -> None:
        """Give what comes to a server process, which answers itself."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serving = subprocess.Popen([SFTP], stdin=subprocess.PIPE, stdout=self.request)
        assert serving.stdin
        coming: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._receive, args=(coming,), daemon=True).start()
        while True:
            due, data = coming.get()
            if not data:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            serving.stdin.write(data)
            serving.stdin.flush()
        serving.stdin.close()
        serving.wait()

    def _receive(self, coming: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = self.request.recv(1 << 16)
            except OSError:
                data = b""
            coming.put((time.monotonic() + AWAY_S, data))


class Server(socketserver.ThreadingTCPServer):
    """Many clients at once."""

    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    AWAY_S = int(sys.argv[2]) / 1e3
    with Server(("", int(sys.argv[1])), Connection) as server:
        server.serve_forever()
