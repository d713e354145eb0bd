"""Client that sends numbered datagrams whether or not answers come. Standard library only.

``datagrams.py echo|dns ADDRESS PORT``. Prints ``ready`` after the first answer and one JSON
object at the end, which comes with the end of standard input: ``sent``, ``lost`` (numbers
without an answer after ``--timeout`` seconds), ``again`` (answered twice), ``wrong``,
``waits_ms`` (of the answers that took longer than 20 ms), ``worst_ms``. Of ``dns`` every
question is another name, every answer 192.0.2.7.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import struct
import sys
import time

_ADDRESS = bytes((192, 0, 2, 7))


def echo(number: int) -> bytes:
    """Begins with its number."""
    return struct.pack("!I", number) + b"x" * (number * 97 % 1200)


def dns(number: int) -> bytes:
    """Question for the address of q<number>.godwit.test."""
    labels = [f"q{number}".encode(), b"godwit", b"test"]
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return struct.pack("!6H", number & 0xFFFF, 0x0100, 1, 0, 0, 0) + name + b"\0\1\0\1"


def answers(protocol: str, answer: bytes, number: int) -> bool:
    """Whether ``answer`` is right."""
    if protocol == "echo":
        return answer == echo(number)
    return answer[12:].startswith(dns(number)[12:]) and answer.endswith(_ADDRESS)


def number_of(protocol: str, answer: bytes) -> int:
    """What it answers."""
    if protocol == "echo":
        return int(struct.unpack_from("!I", answer)[0])
    return int(answer[14 : 13 + answer[12]])


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("protocol", choices=("echo", "dns"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--pause-ms", type=float, default=3.0)
    parser.add_argument("--timeout", type=float, default=10.0)
    options = parser.parse_args()
    make = {"echo": echo, "dns": dns}[options.protocol]
    family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
    client = socket.socket(family, socket.SOCK_DGRAM)
    client.connect((options.address, options.port))
    waiting: dict[int, float] = {}
    sent = again = wrong = 0
    worst = 0.0
    waits: list[float] = []
    stop_at = None
    due = time.monotonic()
    while stop_at is None or (waiting and time.monotonic() < stop_at):
        now = time.monotonic()
        if stop_at is None and now >= due:
            waiting[sent] = now
            client.send(make(sent))
            sent += 1
            due = max(due + options.pause_ms / 1e3, now - 0.05)
        watched = [client] if stop_at else [client, sys.stdin]
        readable, _, _ = select.select(watched, [], [], max(0.0, min(due - now, 0.1)))
        if sys.stdin in readable:
            stop_at = time.monotonic() + options.timeout
        if client in readable:
            answer = client.recv(65536)
            number = number_of(options.protocol, answer)
            if not answers(options.protocol, answer, number):
                wrong += 1
            begun = waiting.pop(number, None)
            if begun is None:
                again += 1
                continue
            took = time.monotonic() - begun
            worst = max(worst, took)
            if took > 0.02:
                waits.append(round(took * 1e3, 1))
            if number == 0:
                print("ready", flush=True)
    report = {
        "sent": sent,
        "lost": sorted(waiting),
        "again": again,
        "wrong": wrong,
        "waits_ms": waits,
        "worst_ms": round(worst * 1e3, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
