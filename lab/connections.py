"""Many connections to a server that answers each line by the connection's next number.

``connections.py ADDRESS PORT COUNT``: holds COUNT connections at once and asks
on all of them in turn until standard input ends; then prints one JSON object
with what was asked, the faults, and the longest wait in milliseconds.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time


def main() -> None:
    address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ended = threading.Event()

    def watch() -> None:
        os.read(0, 1)
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    held = [socket.create_connection((address, port), 20) for _ in range(count)]
    poll = select.poll()
    asked = dict.fromkeys((one.fileno() for one in held), 0)
    since: dict[int, float] = {}
    by_number = {one.fileno(): one for one in held}
    faults: list[str] = []
    worst = answered = 0.0
    for one in held:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(one, select.POLLIN)

    def ask(number: int) -> None:
        asked[number] += 1
        since[number] = time.monotonic()
        by_number[number].sendall(b"\n")

    print("ready", flush=True)
    for number in asked:
        ask(number)
    while since and not faults:
        ready = poll.poll(20_000)
        if not ready:
            faults.append(f"{len(since)} connections are not answered")
        for number, _ in ready:
            try:
                data = by_number[number].recv(100)
            except OSError as error:
                data = repr(error).encode()
            if data != b"%d\n" % asked[number]:
                faults.append(f"{data!r} after {asked[number]}")
                break
            worst = max(worst, time.monotonic() - since.pop(number))
            answered += 1
            if not ended.is_set():
                ask(number)
        time.sleep(0.001)
    report = {"answered": int(answered), "faults": faults, "worst_ms": round(worst * 1000, 1)}
    print(json.dumps(report), flush=True)


main()
