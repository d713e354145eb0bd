"""A program that holds one of each kernel object finds all of them after a move."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from godwit_agent.hostops.model import Moment, PodState
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.store import HostTargetStore
from godwit_api.errors import Retryable
from host.lab import BASE, ROOT, Console, Lab, Node, Pod
from host.test_mechanisms import Agent

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no Python in {BASE}"),
]

IP = "10.98.0.6"
PORT = 7000
PROGRAM = ROOT / "lab/kernelobjects"


def ask(scene: Lab) -> dict[str, str]:
    """Result of every check."""
    client = NetnsThread(f"/proc/{scene.client.pid}/ns/net")
    try:
        connection = client.call(lambda: socket.create_connection((IP, PORT), 30))
    finally:
        client.close()
    with connection, connection.makefile("rb") as answer:
        connection.settimeout(40)
        connection.sendall(b"?")
        return json.loads(answer.read())  # type: ignore[no-any-return]


def wrong(results: dict[str, str]) -> dict[str, str]:
    return {
        name: said
        for name, said in results.items()
        if said != "ok" and not said.startswith("unavailable")
    }


def output(pod: Pod) -> str:
    """What the container has written lately; a check that hangs says where (checks.py)."""
    stream = pod.output[-1].stdout
    assert stream
    os.set_blocking(stream.fileno(), False)
    return (stream.read() or b"").decode()


def start(scene: Lab, node: Node, names: list[str]) -> PodState:
    pod = scene.sandbox(node, IP)
    argv = ["env", "PYTHONPATH=/lab", "python3", "-m", "kernelobjects", *names]
    scene.start(pod, argv, PROGRAM.parent)
    node.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    scene.route(IP, node)
    return Agent(node).pods.find(pod.uid)


@contextlib.contextmanager
def nothing_missing(store: HostTargetStore) -> Iterator[None]:
    assert store.missing() is None
    yield


def move(
    scene: Lab,
    state: PodState,
    here: Node,
    there: Node,
    console: Console | None = None,
    *,
    allowance: int | None = None,
    rounds: bool = True,
    fetching: Callable[[HostTargetStore], contextlib.AbstractContextManager[None]] = (
        nothing_missing
    ),
) -> tuple[Pod, PodState]:
    """The steps of a migration in their order, without a network between the nodes.

    ``allowance``: bytes that are sent of memory, the rest is for ``fetching``, which is entered
    before the restore and left when the source may end. ``rounds``: memory is copied before.
    """
    source, target = Agent(here), Agent(there)
    container, uid = state.containers[0], str(uuid.uuid4())
    source.stores.create_source(uid)
    store = target.stores.create_target(uid, ("main",), 1 << 30)
    memory, files = source.copies.memory(state), source.copies.files(state)
    for _ in range(2):
        files.round(store)
        memory.announce(store)
        for owner, name, content in memory.bootstrap():
            store.image(owner, name, 0, len(content), memoryview(content))
        if rounds:
            memory.round(store)
    source.cgroups.guard(container)
    successor = scene.sandbox(there, IP)
    target.hooks.expect(successor.uid, uid, 1, (IP,), store.slots())
    scene.create(successor, ["true"], console)
    target.restores.wait_waiting(store.slots()["main"], 10)
    arrived = target.pods.find(successor.uid)
    store.bind(arrived)
    files.round(store)
    store.start_daemons()
    door, far = source.network(state), target.network(arrived)
    far.close_door()
    dump = source.dumps.prepare(container, uid, post_copy=allowance is not None)
    dump.wait_waiting(10)
    dump.leave_out(memory.shared("main"))
    frozen = source.cgroups.freeze([container.id], 5)
    door.drop()
    begin = time.monotonic()
    dump.open_gate()
    errors: list[Exception] = []

    def last() -> None:
        try:
            memory.final(store, allowance)
            files.final(store)
        except Exception as error:
            errors.append(error)

    helper = threading.Thread(target=last)
    helper.start()
    try:
        dump.wait_dumped(20)
    finally:
        if keep := os.environ.get("GODWIT_TEST_LOGS"):
            shutil.copytree(dump._path / "work", keep, dirs_exist_ok=True)
    print(f"dump {1000 * (time.monotonic() - begin):.0f} ms")
    helper.join()
    assert not errors
    for name, content in dump.images(moving=True):
        store.image("main", name, 0, len(content), memoryview(content))
    print(store.complete(may_miss=allowance is not None))
    with fetching(store):
        begin = time.monotonic()
        try:
            restored = target.restores.restore(store.slots()["main"], 60)
        finally:
            if keep:
                log = there.layout.local(store.slots()["main"].work) / "restore.log"
                shutil.copy(log, keep)
        print(f"restore {1000 * (time.monotonic() - begin):.0f} ms")
        store.require_shared()
        there.run("ip", "route", "replace", f"{IP}/32", "dev", successor.host_interface)
        here.run("ip", "route", "replace", f"{IP}/32", "via", there.address)
        scene.route(IP, there)
        far.open_door()
        target.restores.resume([restored])
        far.inject(door.held(syn_since_ns=frozen, since=Moment(frozen, frozen)))
        if allowance is not None:
            source.cgroups.freeze([container.id], 5)
    begin = time.monotonic()
    if allowance is not None:  # what has been held ends before CRIU hears of it
        with contextlib.suppress(Retryable):
            source.cgroups.kill([container.id], timeout_s=0.0)
    dump.finish()
    print(f"end of the source {1000 * (time.monotonic() - begin):.0f} ms")
    source.cgroups.kill([container.id])
    drained = store.drained(60)
    if keep:
        log = there.layout.local(store.slots()["main"].work) / "lazy.log"
        shutil.copy(log, keep)
    assert drained
    for closing in (memory, files, door, far):
        closing.close()
    store.destroy()
    target.stores.destroy(uid)
    source.stores.destroy(uid)
    return successor, target.pods.find(successor.uid)


def test_every_kernel_object_moves(scene: Lab) -> None:
    names = os.environ.get("GODWIT_TEST_OBJECTS", "").split()
    state = start(scene, scene.a, names)
    before = ask_when_ready(scene)
    print({name: said for name, said in before.items() if said.startswith("unavailable")})
    assert not wrong(before)
    successor, _ = move(scene, state, scene.a, scene.b)
    try:
        after = wrong(ask(scene))
    except TimeoutError:
        pytest.fail(f"a check hangs: {output(successor)}")
    assert not after, "\n".join(f"{name}: {said}" for name, said in after.items())


def ask_when_ready(scene: Lab) -> dict[str, str]:
    deadline = time.monotonic() + 30
    while True:
        try:
            return ask(scene)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
