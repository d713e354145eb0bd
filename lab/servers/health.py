"""HTTP on port 8080: 200 while the file ``/data/well`` is there, 503 without it."""

from __future__ import annotations

import http.server
from pathlib import Path


class Health(http.server.BaseHTTPRequestHandler):
    """Answers every GET."""

    def do_GET(self) -> None:
        self.send_response(200 if Path("/data/well").exists() else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    Path("/data/well").touch()
    http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Health).serve_forever()
