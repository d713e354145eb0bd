"""Databases move under load: no transaction fails, and their books agree with the clients'."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from e2e.moving import (
    FILTERED,
    client_in,
    exec_in,
    report,
    start,
    start_it,
    there_and_back,
    use,
)
from e2e.support import Scene
from lab import workloads
from lab.software import MARIADB, MEMCACHED, POSTGRESQL, REDIS

pytestmark = pytest.mark.support
_BIN = "/usr/lib/postgresql/current/bin"
_ROWS_AGREE = (
    "select (select count(*) from pgbench_history),"
    " (select sum(delta) from pgbench_history) = (select sum(abalance) from pgbench_accounts),"
    " (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches)"
)


def client_pod(scene: Scene, image: str) -> dict[str, Any]:
    """An ordinary pod to run clients in: it does not move."""
    made = workloads.pod("client", scene.namespace, image, command=["sleep", "infinity"])
    del made["spec"]["runtimeClassName"]
    return made


def test_postgresql_under_pgbench(scene: Scene) -> None:
    """8 clients, five moves; then checksums, indexes and a full dump are sound."""
    image = scene.cluster.workload_image("databases")
    scene.cluster.apply(
        client_pod(scene, image),
        workloads.pod(
            "postgres", scene.namespace, image, node=scene.nodes[0], port=5432,
            volumes={"/data": {"emptyDir": {}}, "/dev/shm": {"emptyDir": {"medium": "Memory"}}},
            command=list(POSTGRESQL.command),
        ),
    )  # fmt: skip
    for name in ("client", "postgres"):
        scene.cluster.wait_ready(name, scene.namespace)
    address = scene.pod("postgres")["status"]["podIP"]
    options = (
        f"-n -h {address} -U postgres -c 8 -j 2 -T 3600 -P 1 --log --log-prefix /tmp/log bench"
    )
    running = subprocess.Popen(
        scene.cluster.argv(
            *("kubectl", "exec", "client", "-n", scene.namespace, "--", "sh", "-c"),
            f"{_BIN}/pgbench {options} & echo $! >/tmp/pid; wait $!",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert running.stdout
    assert "progress" in next(line for line in running.stdout if "progress" in line)
    here = scene.nodes[0]
    moves = []
    for _ in range(5):
        here = scene.other(here)
        moves.append(scene.must_succeed("postgres", here))
    # pgbench answers SIGALRM, its own end of time, by its summary
    exec_in(scene, "client", "sh", "-c", "kill -ALRM $(cat /tmp/pid)")
    summary, _ = running.communicate(timeout=60)
    assert running.returncode == 0, summary
    done = re.search(r"number of transactions actually processed: (\d+)", summary)
    failed = re.search(r"number of failed transactions: (\d+)", summary)
    assert done, summary
    assert failed, summary
    assert int(failed[1]) == 0
    assert int(done[1]) > 100
    # third column: microseconds of a transaction
    longest = exec_in(scene, "client", "sh", "-c", "cut -d' ' -f3 /tmp/log.* | sort -n | tail -1")
    psql = ("psql", "-h", "/tmp", "-U", "postgres", "-At", "bench", "-c")
    assert exec_in(scene, "postgres", *psql, _ROWS_AGREE).strip() == f"{done[1]}|t|t"
    exec_in(scene, "postgres", *psql, "create extension amcheck")
    exec_in(scene, "postgres", f"{_BIN}/pg_amcheck", "-h", "/tmp", "-U", "postgres", "bench")
    dump = exec_in(scene, "postgres", "sh", "-c", "pg_dump -h /tmp -U postgres bench | wc -l")
    assert int(dump) > 500_000
    faults = exec_in(
        scene, "postgres", *psql, "select sum(checksum_failures) from pg_stat_database"
    )
    assert faults.strip() == "0"
    scene.record(POSTGRESQL.row, moves, int(longest) / 1e3)


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        ("RuntimeDefault", FILTERED, ()),
        ("innodb_use_native_aio=0", {}, ("--innodb-use-native-aio=0",)),
    ],
)
def test_mariadb_under_transfers(
    scene: Scene, how: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    """8 connections, three moves: its tables are what the clients' ledgers say.

    Without one of the two MariaDB uses io_uring, which is refused.
    """
    image = scene.cluster.workload_image("databases")
    scene.cluster.apply(client_pod(scene, image))
    scene.cluster.wait_ready("client", scene.namespace)
    address = start(scene, "databases", MARIADB.port, *MARIADB.command, *words, **options)
    using = client_in(scene, "client", "python3", "/lab/transfers.py", address)
    moves = there_and_back(scene)
    moves.append(scene.must_succeed("server", scene.nodes[1]))
    seen = report(using)
    assert seen["errors"] == [], seen
    assert seen["committed"] > 100
    assert seen["differences"] == 0, seen
    sql = ("mariadb", "--socket=/data/db/socket", "-N", "-e")
    checked = exec_in(scene, "server", *sql, "check table bench.account, bench.history extended")
    assert [line.split("\t")[-1] for line in checked.splitlines()] == ["OK", "OK"], checked
    scene.record(f"{MARIADB.row} ({how})", moves, seen["worst_ms"])


def test_redis_has_all_in_its_append_only_file(scene: Scene) -> None:
    """Moved there, killed, started again on its file: every INCR that was answered is in it."""
    using = use(scene, REDIS, start_it(scene, REDIS))
    moves = there_and_back(scene)
    moves.append(scene.must_succeed("server", scene.nodes[1]))
    seen = report(using)
    assert seen["error"] is None, seen
    crash(scene, "server", scene.nodes[1])
    wanted = [str(-(-answers // 3)) for answers in seen["each"]]
    keys = [f"n:c{number}" for number in range(len(wanted))]
    assert exec_in(scene, "server", "redis-cli", "mget", *keys).split() == wanted
    scene.record(REDIS.row, moves, seen["worst_ms"])


def crash(scene: Scene, pod: str, node: str) -> None:
    """Kill the container's first process from its node; the kubelet starts another."""
    seen = scene.pod(pod)
    assert seen["spec"]["nodeName"] == node
    (container,) = seen["status"]["containerStatuses"]
    name = container["containerID"].partition("://")[2]
    scene.cluster.node_exec(node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", name)
    count = container["restartCount"] + 1
    scene.cluster.kubectl(
        *("wait", "pod", pod, "-n", scene.namespace, "--timeout=120s"),
        f"--for=jsonpath={{.status.containerStatuses[0].restartCount}}={count}",
    )
    scene.cluster.wait_ready(pod, scene.namespace)


def test_memcached_keeps_every_item(scene: Scene) -> None:
    using = use(scene, MEMCACHED, start_it(scene, MEMCACHED))
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert min(seen["each"]) > 4
    scene.record(MEMCACHED.row, moves, seen["worst_ms"])
