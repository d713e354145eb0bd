"""Client of many connections that stay; every answer is checked. Standard library only.

``many.py PROTOCOL ADDRESS PORT``: on each of ``--connections`` one request is under
way at a time. Prints ``ready`` when each has had an answer, and one JSON object at
the end, which comes with the end of standard input or SIGTERM: ``answers`` (all),
``each`` (per connection), ``worst_ms`` (longest wait for one answer) and ``error``.

Protocols: ``lines`` (lines.py and its relatives), ``redis`` and ``memcached`` (INCR of a
key per connection and a value that is written and read), ``http`` (GET of a number that
counts; kept-alive).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator

Talk = Generator[bytes, bytes, None]


def lines(name: str) -> Talk:
    """Answers are ``NUMBER LINE``."""
    number = 0
    while True:
        number += 1
        line = f"{name} {number} " + "x" * (number * 97 % 1400)
        answer = yield line.encode() + b"\n"
        if answer != f"{number} {line}\n".encode():
            raise ValueError(f"{answer!r} to {line!r}")


def redis(name: str) -> Talk:
    """A counter and a value."""
    number = 0

    def command(*words: bytes) -> bytes:
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        return b"*%d\r\n%s" % (len(words), parts)

    while True:
        number += 1
        key, value = name.encode(), b"v%d" % number * (number % 200 + 1)
        _expect((yield command(b"INCR", b"n:" + key)), b":%d\r\n" % number)
        _expect((yield command(b"GETSET", b"v:" + key, value)), None)
        _expect((yield command(b"STRLEN", b"v:" + key)), b":%d\r\n" % len(value))


def memcached(name: str) -> Talk:
    """A counter and a value."""
    key, number = name.encode(), 0
    _expect((yield b"set n:%s 0 0 1\r\n0\r\n" % key), b"STORED\r\n")
    while True:
        number += 1
        value = b"v%d" % number * (number % 200 + 1)
        _expect((yield b"incr n:%s 1\r\n" % key), b"%d\r\n" % number)
        written = b"%d\r\n%s\r\n" % (len(value), value)
        _expect((yield b"set v:%s 0 0 %s" % (key, written)), b"STORED\r\n")
        _expect((yield b"get v:%s\r\n" % key), b"VALUE v:%s 0 %sEND\r\n" % (key, written))


NUMBERS: list[int] = []


def http(name: str) -> Talk:
    """Every number that the server has given is kept in NUMBERS."""
    while True:
        answer = yield f"GET /counter/ HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"{answer!r}")
        NUMBERS.append(int(answer.partition(b"\r\n\r\n")[2]))


def _expect(answer: bytes, wanted: bytes | None) -> None:
    if wanted is not None and answer != wanted:
        raise ValueError(f"{answer!r} where {wanted!r} was expected")


def complete(protocol: str, answer: bytes) -> bool:
    """Whether all of an answer is there."""
    if protocol == "http":
        head, _, body = answer.partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length:")
        return bool(length) and len(body) == int(length.split(b"\r\n")[0])
    if answer.startswith(b"VALUE"):
        return answer.endswith(b"END\r\n")
    if protocol == "redis" and answer.startswith(b"$") and not answer.startswith(b"$-1"):
        head, _, body = answer.partition(b"\r\n")
        return len(body) == int(head[1:]) + 2
    return answer.endswith(b"\n")


class Connection:
    """One connection and its conversation."""

    def __init__(self, protocol: str, address: str, port: int, name: str) -> None:
        talks: dict[str, Callable[[str], Talk]] = {
            "lines": lines, "redis": redis, "memcached": memcached, "http": http,
        }  # fmt: skip
        self.protocol = protocol
        self.socket = socket.create_connection((address, port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._talk = talks[protocol](name)
        self._next = next(self._talk)
        self._have = b""
        self.begun = self.answers = 0.0
        self.due = 0.0
        self.asked = False

    def ask(self) -> None:
        """Send the next request."""
        self.socket.sendall(self._next)
        self.begun, self.asked = time.monotonic(), True

    def hear(self) -> float | None:
        """Read; seconds that the answer took if it is complete."""
        data = self.socket.recv(65536)
        if not data:
            raise ValueError("closed by the server")
        self._have += data
        if not complete(self.protocol, self._have):
            return None
        answer, self._have = self._have, b""
        self._next = self._talk.send(answer)
        self.answers += 1
        self.asked = False
        return time.monotonic() - self.begun


class Stopped(Exception):
    """Told to end."""


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("protocol", choices=("lines", "redis", "memcached", "http"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--pause-ms", type=float, default=100.0, help="after each answer")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer")
    parser.add_argument("--until-signal", action="store_true", help="do not read standard input")
    options = parser.parse_args()
    state = {"stop": False}
    signal.signal(signal.SIGTERM, lambda *_: state.update(stop=True))
    selector = selectors.DefaultSelector()
    if not options.until_signal:
        selector.register(sys.stdin, selectors.EVENT_READ)
    all_ = [
        Connection(options.protocol, options.address, options.port, f"c{number}")
        for number in range(options.connections)
    ]
    for one in all_:
        selector.register(one.socket, selectors.EVENT_READ, one)
    worst, error, ready, stop = 0.0, None, False, False
    try:
        while True:
            now = time.monotonic()
            stop = stop or state["stop"]
            if stop and not any(one.asked for one in all_):
                break
            for one in all_:
                if not one.asked and not stop and now >= one.due:
                    one.ask()
                if one.asked and now - one.begun > options.timeout:
                    raise TimeoutError("no answer in time")
            for key, _ in selector.select(0.005):
                if key.data is None:
                    stop = True
                    selector.unregister(sys.stdin)
                    continue
                took = key.data.hear()
                if took is not None:
                    worst = max(worst, took)
                    key.data.due = time.monotonic() + options.pause_ms / 1e3
            if not ready and all(one.answers for one in all_):
                ready = True
                print("ready", flush=True)
    except (OSError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    report = {
        "error": error,
        "answers": int(sum(one.answers for one in all_)),
        "each": [int(one.answers) for one in all_],
        "worst_ms": round(worst * 1e3, 1),
        "numbers": NUMBERS,
        "locals": len({one.socket.getsockname()[:2] for one in all_}),
    }
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(report), flush=True)
    return 0 if error is None else 1


if __name__ == "__main__":
    sys.exit(main())
