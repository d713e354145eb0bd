"""Holds one of each kernel object; answers each connection to port 7000 with all results.

A connection gets one JSON object, name of the check to ``ok`` or what is wrong.
``python3 -m kernelobjects NAME…`` holds only the named ones.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from . import checks, clocks, descriptors, files, memory, processes, terminals

OF_CHECKS = (processes, descriptors, clocks, files, memory, terminals)
PORT = 7000


BLOCKED = {signal.SIGUSR1, signal.SIGRTMIN + 5, signal.SIGRTMIN + 6}


def main() -> None:
    # before any thread exists, so that none of them takes what a check queues
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    board = checks.Board(sys.argv[1:])
    board.set_up()
    server = socket.create_server(("0.0.0.0", PORT))
    print(f"{os.getpid()} holds {len(board)} objects", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            if connection.recv(1):  # a probe only connects
                connection.sendall(json.dumps(board.look()).encode())
                # a child that a check has just made holds the connection too
                connection.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
