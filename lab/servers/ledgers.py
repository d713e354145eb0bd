"""Clients of ``ledger.py`` that stay: every answer is checked. Standard library only.

``ledgers.py ADDRESS PORT``: on each of ``--connections`` one line is under way at a time. Prints
``ready`` when each has had an answer, and one JSON object at the end, which comes with the end of
standard input: ``lines``, ``error``, ``worst_ms`` (longest wait for one answer) and the SHA-256
of what the files must be: ``content`` (all lines in their order) and ``mapped``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
import threading
import time

SLOT, SLOTS = 64, 1 << 16


class Writer(threading.Thread):
    """One connection."""

    def __init__(self, name: str, address: str, port: int, pause_s: float) -> None:
        super().__init__()
        self.name, self._pause_s = name, pause_s
        self.lines: list[bytes] = []
        self.worst, self.error = 0.0, ""
        self.first, self.stop = threading.Event(), threading.Event()
        self._socket = socket.create_connection((address, port), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")

    def ask(self, text: bytes) -> bytes:
        """The answer to one line. ``OSError``."""
        self._socket.sendall(text + b"\n")
        return self._answers.readline()

    def run(self) -> None:
        """Until told to stop."""
        number = 0
        try:
            while not self.stop.wait(self._pause_s):
                number += 1
                text = f"{self.name} {number} ".encode() + b"x" * (number * 97 % 300)
                begin = time.monotonic()
                answer = self.ask(text)
                self.worst = max(self.worst, time.monotonic() - begin)
                if answer.partition(b" ")[2] != text + b"\n":
                    raise ValueError(f"{answer!r} to {text!r}")
                self.lines.append(answer)
                self.first.set()
        except (OSError, ValueError) as failure:
            self.error = f"{type(failure).__name__}: {failure}"
            self.first.set()


def expected(lines: list[bytes]) -> tuple[str, str]:
    """What the files must be if all has gone well; ``ValueError`` for a gap in the numbers."""
    ordered = sorted((int(line.split(b" ", 1)[0]), line) for line in lines)
    if [number for number, _ in ordered] != list(range(1, len(ordered) + 1)):
        raise ValueError("a number was given twice, or left out")
    table = bytearray(SLOT * SLOTS)
    for number, line in ordered:
        table[number * SLOT : (number + 1) * SLOT] = line[:SLOT].ljust(SLOT, b"\0")
    content = b"".join(line for _, line in ordered)
    return hashlib.sha256(content).hexdigest(), hashlib.sha256(table).hexdigest()


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=5.0)
    options = parser.parse_args()
    writers = [
        Writer(f"c{number}", options.address, options.port, options.pause_ms / 1e3)
        for number in range(options.connections)
    ]
    for one in writers:
        one.start()
    for one in writers:
        one.first.wait()
    print("ready", flush=True)
    sys.stdin.read()
    for one in writers:
        one.stop.set()
    for one in writers:
        one.join()
    errors = [one.error for one in writers if one.error]
    lines = [line for one in writers for line in one.lines]
    content = mapped = ""
    try:
        if not errors:
            content, mapped = expected(lines)
            if (said := writers[0].ask(b"sync")) != b"synced %d\n" % len(lines):
                errors.append(f"{said!r} after {len(lines)} lines")
    except (OSError, ValueError) as failure:
        errors.append(f"{type(failure).__name__}: {failure}")
    report = {
        "error": errors[0] if errors else None,
        "lines": len(lines),
        "worst_ms": round(max(one.worst for one in writers) * 1e3, 1),
        "content": content,
        "mapped": mapped,
    }
    print(json.dumps(report), flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
