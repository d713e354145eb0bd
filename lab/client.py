"""Clients that see a migration from outside; standard library only.

Run as ``python3 client.py count|connect …`` in whatever place the caller wants
to observe from (a network namespace, a pod). Both print one JSON object per
line on standard output: ``{"type": "tick", …}`` about five times a second and
one ``{"type": "report", …}`` at the end, which comes on SIGTERM, SIGINT, end
of standard input or after ``--seconds``. Times are Unix seconds, gaps
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

TICK_SECONDS = 0.2
GAP_OF_INTEREST_MS = 15.0


class Stop:
    """Set by a signal or by the end of standard input."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds if seconds else None
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._event.set())
        if not os.isatty(0):
            threading.Thread(target=self._watch_stdin, daemon=True).start()

    def _watch_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        self._event.set()

    def __bool__(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or self._event.is_set()


def emit(kind: str, **fields: Any) -> None:
    """Print one line of JSON at once."""
    sys.stdout.write(json.dumps({"type": kind, **fields}) + "\n")
    sys.stdout.flush()


def encode(*words: str | bytes) -> bytes:
    """A command in the Redis protocol."""
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    out = [b"*%d\r\n" % len(parts)]
    out += [b"$%d\r\n%s\r\n" % (len(part), part) for part in parts]
    return b"".join(out)


def count(options: argparse.Namespace) -> int:
    """INCR one key on ONE connection every ``--interval-ms``; every reply is checked."""
    stop = Stop(options.seconds)
    connection = socket.create_connection((options.address, options.port), timeout=options.timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    replies = connection.makefile("rb")
    command = encode("INCR", options.key)
    connection.sendall(encode("SET", options.key, "0"))
    replies.readline()
    done = 0
    error: str | None = None
    gaps: list[dict[str, float]] = []
    worst = worst_of_tick = 0.0
    started = last = time.monotonic()
    next_tick = started + TICK_SECONDS
    local = connection.getsockname()
    while not stop:
        try:
            connection.sendall(command)
            line = replies.readline()
        except OSError as failure:
            error = f"{type(failure).__name__}: {failure}"
            break
        if not line:
            error = "connection closed by the server"
            break
        done += 1
        if line != b":%d\r\n" % done:
            error = f"reply {line!r} where :{done} was expected"
            break
        now = time.monotonic()
        gap = (now - last) * 1e3
        last = now
        worst = max(worst, gap)
        worst_of_tick = max(worst_of_tick, gap)
        if gap >= GAP_OF_INTEREST_MS:
            gaps.append({"at": time.time(), "ms": round(gap, 3)})
        if now >= next_tick:
            emit("tick", count=done, worst_ms=round(worst_of_tick, 2), at=time.time())
            worst_of_tick = 0.0
            next_tick = now + TICK_SECONDS
        time.sleep(options.interval_ms / 1e3)
    emit(
        "report",
        ok=error is None,
        error=error,
        count=done,
        seconds=round(time.monotonic() - started, 3),
        worst_ms=round(worst, 2),
        gaps=gaps,
        local=f"{local[0]}:{local[1]}",
    )
    return 0 if error is None else 1


def connect(options: argparse.Namespace) -> int:
    """Open a NEW connection every ``--interval-ms`` and PING; every failure is kept."""
    stop = Stop(options.seconds)
    open_: dict[int, tuple[socket.socket, float, bool]] = {}
    poller = select.epoll()
    failures: list[dict[str, Any]] = []
    total = answered = 0
    worst = 0.0
    next_start = next_tick = time.monotonic()

    def fail(fd: int, why: str) -> None:
        sock, begun, _ = open_.pop(fd)
        failures.append(
            {"at": time.time(), "after_ms": (time.monotonic() - begun) * 1e3, "why": why}
        )
        poller.unregister(fd)
        sock.close()

    while not stop or open_:
        now = time.monotonic()
        if not stop and now >= next_start:
            sock = socket.socket(socket.AF_INET6 if ":" in options.address else socket.AF_INET)
            sock.setblocking(False)
            sock.connect_ex((options.address, options.port))
            open_[sock.fileno()] = (sock, now, False)
            poller.register(sock.fileno(), select.EPOLLOUT)
            total += 1
            next_start = max(next_start + options.interval_ms / 1e3, now - 0.1)
        for fd, _ in poller.poll(max(0.0, min(next_start - now, 0.05))):
            sock, begun, connected = open_[fd]
            try:
                if not connected:
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code:
                        raise OSError(code, os.strerror(code))
                    sock.send(encode("PING"))
                    open_[fd] = (sock, begun, True)
                    poller.modify(fd, select.EPOLLIN)
                    continue
                answer = sock.recv(64)
                if not answer.startswith(b"+PONG"):
                    raise OSError(f"answer {answer!r}")
            except OSError as failure:
                fail(fd, str(failure))
                continue
            answered += 1
            worst = max(worst, (time.monotonic() - begun) * 1e3)
            open_.pop(fd)
            poller.unregister(fd)
            sock.close()
        for fd in [fd for fd, (_, begun, _) in open_.items() if now - begun > options.timeout]:
            fail(fd, "no answer in time")
        if now >= next_tick:
            emit("tick", total=total, answered=answered, failed=len(failures), at=time.time())
            next_tick = now + TICK_SECONDS
    emit(
        "report",
        ok=not failures,
        total=total,
        answered=answered,
        failures=failures,
        worst_ms=round(worst, 2),
    )
    return 0 if not failures else 1


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("count", "connect"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--interval-ms", type=float, default=5.0)
    parser.add_argument("--key", default="godwit:counter")
    parser.add_argument("--seconds", type=float, default=0.0, help="0: until told to stop")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without an answer")
    options = parser.parse_args()
    return count(options) if options.what == "count" else connect(options)


if __name__ == "__main__":
    sys.exit(main())
