"""Publishers and subscribers of a NATS server, each on a connection that stays.

``pubsub.py ADDRESS PORT``: every subscriber must get every message of every publisher
once and in order. Prints ``ready`` when all have heard, and one JSON object at the end,
which comes with the end of standard input: ``published``, ``delivered``, ``error``,
``worst_ms`` (longest way of a message). Standard library only.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time


class Connection:
    """One connection to the server."""

    def __init__(self, address: str, port: int) -> None:
        self.socket = socket.create_connection((address, port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._have = b""
        self.send(b'CONNECT {"verbose":false,"pedantic":true}\r\nPING\r\n')

    def send(self, data: bytes) -> None:
        """All of it."""
        self.socket.sendall(data)

    def hear(self) -> list[bytes]:
        """Payloads of the messages that have come; raises ValueError for an error."""
        data = self.socket.recv(65536)
        if not data:
            raise ValueError("closed by the server")
        self._have += data
        messages = []
        while b"\r\n" in self._have:
            line, _, rest = self._have.partition(b"\r\n")
            if line.startswith(b"MSG "):
                size = int(line.split()[-1])
                if len(rest) < size + 2:
                    break
                messages.append(rest[:size])
                rest = rest[size + 2 :]
            elif line == b"PING":
                self.send(b"PONG\r\n")
            elif line.startswith(b"-ERR"):
                raise ValueError(line.decode())
            self._have = rest
        return messages


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--publishers", type=int, default=4)
    parser.add_argument("--subscribers", type=int, default=8)
    parser.add_argument("--pause-ms", type=float, default=10.0)
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    publishers = [Connection(options.address, options.port) for _ in range(options.publishers)]
    subscribers = [Connection(options.address, options.port) for _ in range(options.subscribers)]
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for one in publishers:
        selector.register(one.socket, selectors.EVENT_READ, (one, None))
    for one in subscribers:
        one.send(b"SUB godwit.> 1\r\nPING\r\n")
        heard = b""
        while heard.count(b"PONG") < 2:
            heard += one.socket.recv(65536)
        selector.register(one.socket, selectors.EVENT_READ, (one, [0] * len(publishers)))
    published = [0] * len(publishers)
    delivered, worst, error, stop_at, ready = 0, 0.0, None, None, False
    due = time.monotonic()
    try:
        while stop_at is None or delivered < sum(published) * len(subscribers):
            now = time.monotonic()
            if stop_at is not None and now > stop_at:
                raise TimeoutError("messages are missing")
            if stop_at is None and now >= due:
                for number, one in enumerate(publishers):
                    body = b"%d %d %d" % (number, published[number], int(now * 1e6))
                    one.send(b"PUB godwit.p%d %d\r\n%s\r\n" % (number, len(body), body))
                    published[number] += 1
                due = max(due + options.pause_ms / 1e3, now - 0.05)
            for key, _ in selector.select(0.003):
                if key.data is None:
                    selector.unregister(sys.stdin)
                    stop_at = time.monotonic() + options.timeout
                    continue
                connection, expected = key.data
                for message in connection.hear():
                    publisher, number, at = (int(word) for word in message.split())
                    if number != expected[publisher]:
                        raise ValueError(f"message {number} where {expected[publisher]} was due")
                    expected[publisher] += 1
                    delivered += 1
                    worst = max(worst, time.monotonic() - at / 1e6)
            if not ready and delivered >= len(subscribers):
                ready = True
                print("ready", flush=True)
    except (OSError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    report = {
        "error": error,
        "published": sum(published),
        "delivered": delivered,
        "worst_ms": round(worst * 1e3, 1),
    }
    print(json.dumps(report))
    return 0 if error is None else 1


if __name__ == "__main__":
    sys.exit(main())
