"""Clients of MariaDB that transfer between accounts and keep a ledger of what was committed.

``transfers.py ADDRESS``: 8 connections, one thread each. Prints ``ready`` when each has
committed, and one JSON object at the end (end of standard input or SIGTERM): ``committed``,
``errors``, ``worst_ms`` (longest transaction) and ``differences`` between ledger and tables.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from typing import Any

import pymysql  # type: ignore[import-untyped]

CLIENTS, ACCOUNTS = 8, 1000
STOP = threading.Event()


def connect(address: str) -> Any:
    return pymysql.connect(
        host=address, user="bench", password="bench", database="bench", read_timeout=120
    )


def prepare(address: str) -> None:
    with connect(address) as connection, connection.cursor() as cursor:
        cursor.execute("create table account (id int primary key, balance bigint) engine=innodb")
        cursor.execute(
            "create table history (client int, number int, amount int, a int, b int,"
            " primary key (client, number)) engine=innodb"
        )
        cursor.executemany("insert into account values (%s, 0)", [(n,) for n in range(ACCOUNTS)])
        connection.commit()


class Client(threading.Thread):
    """One connection."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__()
        self.number = number
        self.connection = connect(address)
        self.ledger: list[tuple[int, int, int]] = []
        self.error: str | None = None
        self.worst = 0.0
        self.committed = threading.Event()

    def run(self) -> None:
        chance = random.Random(self.number)
        try:
            while not STOP.is_set():
                a, b = sorted(chance.sample(range(ACCOUNTS), 2))
                entry = (chance.randrange(1, 1000), a, b)
                begun = time.monotonic()
                self._transfer(len(self.ledger), *entry)
                self.worst = max(self.worst, time.monotonic() - begun)
                self.ledger.append(entry)
                self.committed.set()
                time.sleep(0.01)
        except Exception as failure:
            self.error = f"{type(failure).__name__}: {failure}"
        self.committed.set()

    def _transfer(self, number: int, amount: int, a: int, b: int) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute("update account set balance = balance - %s where id = %s", (amount, a))
            cursor.execute("update account set balance = balance + %s where id = %s", (amount, b))
            cursor.execute(
                "insert into history values (%s, %s, %s, %s, %s)",
                (self.number, number, amount, a, b),
            )
        self.connection.commit()


def differences(address: str, clients: list[Client]) -> int:
    """Rows and balances that are not as the ledgers say."""
    history = {
        (client.number, number, *entry)
        for client in clients
        for number, entry in enumerate(client.ledger)
    }
    balances = dict.fromkeys(range(ACCOUNTS), 0)
    for _, _, amount, a, b in history:
        balances[a] -= amount
        balances[b] += amount
    with connect(address) as connection, connection.cursor() as cursor:
        cursor.execute("select client, number, amount, a, b from history")
        found = len(history ^ set(cursor.fetchall()))
        cursor.execute("select id, balance from account")
        return found + len(set(balances.items()) ^ set(cursor.fetchall()))


def until_end_of_input() -> None:
    sys.stdin.read()
    STOP.set()


def main() -> None:
    """Command line entry."""
    address = sys.argv[1]
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    prepare(address)
    clients = [Client(address, number) for number in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.committed.wait()
    print("ready", flush=True)
    threading.Thread(target=until_end_of_input, daemon=True).start()
    STOP.wait()
    for one in clients:
        one.join()
    report = {
        "committed": sum(len(one.ledger) for one in clients),
        "errors": [one.error for one in clients if one.error],
        "worst_ms": round(max(one.worst for one in clients) * 1e3, 1),
        "differences": differences(address, clients),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
