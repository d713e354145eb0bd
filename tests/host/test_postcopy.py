"""A process runs on its new node while most of its memory is still on the old one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.model import PodState
from godwit_agent.hostops.ports import MissingPages, Serving
from godwit_agent.hostops.store import HostTargetStore
from host.lab import BASE, ROOT, Lab, needs_tracking
from host.test_changing_memory import said, wait_for_passes
from host.test_kernel_objects import IP, move
from host.test_mechanisms import Agent

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not BASE.exists(), reason=f"no {BASE}"),
]

_SENT_BYTES = 256 << 10
_PIECE_BYTES = 1 << 20


def start_turmoil(scene: Lab, tmp_path: Path, *turmoil: str) -> PodState:
    source = ROOT / "lab/turmoil/turmoil.c"
    argv = ["gcc", "-O2", "-static", "-pthread", "-o", str(tmp_path / "turmoil"), str(source)]
    subprocess.run(argv, check=True)
    pod = scene.sandbox(scene.a, IP)
    scene.start(pod, ["/lab/turmoil", "/data", *turmoil], tmp_path)
    scene.a.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    state = Agent(scene.a).pods.find(pod.uid)
    wait_for_passes(state.containers[0].init_pid, 1)
    return state


class Fetching:
    """What an agent does, with a link that lets a piece through every ``pause_s``.

    ``restart``: the target's agent is another one from a quarter on. (A child that was there in the
    freeze has half of what is missing, and ends soon: with all of its parent's pages here the
    daemon would have nothing left to serve.)
    """

    def __init__(
        self,
        scene: Lab,
        state: PodState,
        pause_s: float,
        *,
        restart: bool = False,
        everything: bool = True,
    ) -> None:
        self._all = everything
        self._scene = scene
        self._frozen = Agent(scene.a).copies.frozen(state)
        self._pause_s = pause_s
        self._restart = restart
        self._stop = threading.Event()
        self.asked = 0
        self.errors: list[Exception] = []

    @contextlib.contextmanager
    def __call__(self, store: HostTargetStore) -> Iterator[None]:
        missing = store.missing()
        assert missing
        began = missing.bytes
        assert began > (80 << 20 if self._all else 1 << 20)
        missing.hold()
        first = self._begin(missing, began * 3 // 4 if self._restart else 0)
        yield
        self._end(first)
        if self._restart:
            assert 0 < missing.bytes < began
            missing.let_go()
            (uid,) = Agent(self._scene.b).stores.list()
            again = Agent(self._scene.b).stores.open_target(uid)
            assert again
            found = again.missing()
            assert found
            assert found.bytes == missing.bytes
            assert found.serving() is Serving.RUNNING
            found.hold()
            self._end(self._begin(found, 0))
            missing = found
        assert missing.bytes == 0
        assert missing.serving() is not Serving.BROKEN
        missing.let_go()
        self._frozen.close()
        print(f"{began >> 20} MiB were missing, {self.asked} pieces of them asked for")

    def _begin(self, missing: MissingPages, until: int) -> list[threading.Thread]:
        self._stop.clear()  # of what an earlier agent had
        stream = threading.Thread(target=self._try, args=(lambda: self._stream(missing, until),))
        serve = threading.Thread(target=self._try, args=(lambda: self._serve(missing),))
        for thread in (stream, serve):
            thread.start()
        return [stream, serve]

    def _end(self, threads: list[threading.Thread]) -> None:
        threads[0].join(120)
        self._stop.set()
        threads[1].join()
        assert not self.errors

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.errors.append(error)

    def _serve(self, missing: MissingPages) -> None:
        while not self._stop.is_set():
            for piece in missing.wanted(0.05):
                missing.arrived(piece, self._frozen.read(piece))
                self.asked += 1

    def _stream(self, missing: MissingPages, until: int) -> None:
        for piece in missing.pieces(_PIECE_BYTES):
            if missing.bytes <= until:
                return
            time.sleep(self._pause_s)
            missing.arrived(piece, self._frozen.read(piece))


@pytest.mark.parametrize("turmoil", ["drop", "purge", "split", "move", "fork", ""])
def test_every_word_is_there(scene: Lab, tmp_path: Path, turmoil: str) -> None:
    state = start_turmoil(scene, tmp_path, *turmoil.split())
    fetching = Fetching(scene, state, 0.02)
    _, arrived = move(
        scene, state, scene.a, scene.b, allowance=_SENT_BYTES, rounds=False, fetching=fetching
    )
    assert fetching.asked
    assert not said(arrived.containers[0].init_pid, "wrong")
    wait_for_passes(arrived.containers[0].init_pid, 2)


@needs_tracking  # by its digest, a page that was written again as it was is the same
def test_what_was_copied_and_written_again_is_fetched(scene: Lab, tmp_path: Path) -> None:
    """CRIU does not look at memory that is tracked; what has been copied and not written since
    is served as it lies there."""
    state = start_turmoil(scene, tmp_path, "drop")
    fetching = Fetching(scene, state, 0.02, everything=False)
    _, arrived = move(scene, state, scene.a, scene.b, allowance=_SENT_BYTES, fetching=fetching)
    assert not said(arrived.containers[0].init_pid, "wrong")
    wait_for_passes(arrived.containers[0].init_pid, 2)


def test_another_agent_goes_on(scene: Lab, tmp_path: Path) -> None:
    """What is missing, and what was asked for, lies with the store."""
    state = start_turmoil(scene, tmp_path, "fork")
    fetching = Fetching(scene, state, 0.02, restart=True)
    _, arrived = move(
        scene, state, scene.a, scene.b, allowance=_SENT_BYTES, rounds=False, fetching=fetching
    )
    assert not said(arrived.containers[0].init_pid, "wrong")
    wait_for_passes(arrived.containers[0].init_pid, 2)


class Over(Exception):
    pass


# a move that is left in the middle closes nothing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_process_whose_page_daemon_dies_does_not_go_on_with_zeros(
    scene: Lab, tmp_path: Path
) -> None:
    """It waits, and whoever holds its memory hears of it at once. (Held by nobody it has read
    zeros, and ended with a fault at address 0, in every second run.)"""
    state = start_turmoil(scene, tmp_path, "split")

    frozen, restoring = Agent(scene.a).copies.frozen(state), threading.Event()

    def serve(missing: MissingPages) -> None:
        while not restoring.is_set():
            for piece in missing.wanted(0.02):
                missing.arrived(piece, frozen.read(piece))

    @contextlib.contextmanager
    def fetching(store: HostTargetStore) -> Iterator[None]:
        missing = store.missing()
        assert missing
        server = threading.Thread(target=serve, args=(missing,))
        server.start()
        yield
        restoring.set()
        server.join()
        missing.hold()
        (restored,) = (Agent(scene.b).restores.find(slot) for slot in store.slots().values())
        assert restored
        deadline = time.monotonic() + 20
        while not missing.wanted(0.1):
            assert time.monotonic() < deadline, "nothing waits"
        (daemon,) = Path(scene.b.layout.local(store.slots()["main"].directory)).glob("pages/*.pid")
        os.kill(int(daemon.read_text()), signal.SIGKILL)
        while missing.serving() is Serving.RUNNING:
            missing.wanted(5)
        assert missing.serving() is Serving.BROKEN
        passes = said(restored.init_pid, "passes")
        time.sleep(0.5)
        assert said(restored.init_pid, "passes") == passes
        assert not said(restored.init_pid, "wrong")
        Agent(scene.b).restores.abort(store.slots()["main"])
        missing.let_go()
        raise Over

    with pytest.raises(Over):
        move(scene, state, scene.a, scene.b, allowance=_SENT_BYTES, rounds=False, fetching=fetching)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_stands_on_the_source_stands_without_criu(scene: Lab, tmp_path: Path) -> None:
    """Else the death of one process there would make a second running copy."""
    state = start_turmoil(scene, tmp_path, "split")
    source, container = Agent(scene.a), state.containers[0]
    serving = Fetching(scene, state, 0.0)

    @contextlib.contextmanager
    def fetching(store: HostTargetStore) -> Iterator[None]:
        missing = store.missing()
        assert missing
        threads = serving._begin(missing, 64 << 20)
        yield
        serving._end(threads)
        source.cgroups.freeze([container.id], 5)
        (pid,) = scene.a.layout.local("/run/godwit/store").glob("*/source/*/pid")
        runc = int(pid.read_text())
        criu = [one for one in procs.tree(runc) if one != runc]
        assert criu
        passes = said(container.init_pid, "passes")
        for one in (*criu, runc):
            os.kill(one, signal.SIGKILL)
        while any(procs.states(one) - {"Z", "X"} for one in criu):
            time.sleep(0.01)
        print(procs.states(container.init_pid), source.cgroups.frozen(container.id))
        serving._end(serving._begin(missing, 0))
        assert missing.bytes == 0
        assert said(container.init_pid, "passes") == passes
        assert not said(container.init_pid, "wrong")
        begin = time.monotonic()
        source.cgroups.kill([container.id])
        print(f"killed in {time.monotonic() - begin:.2f} s")
        assert not procs.states(container.init_pid) - {"Z", "X"}
        missing.let_go()
        raise Over

    with pytest.raises(Over):
        move(scene, state, scene.a, scene.b, allowance=_SENT_BYTES, rounds=False, fetching=fetching)
