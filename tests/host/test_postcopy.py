"""A process runs on its new node while most of its memory is still on the old one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops.model import PodState
from godwit_agent.hostops.ports import Serving
from godwit_agent.hostops.store import HostTargetStore
from host.lab import BASE, ROOT, Lab, lab
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


@pytest.fixture
def scene() -> Iterator[Lab]:
    scratch = Path(tempfile.mkdtemp(prefix="godwit-lab-", dir="/var/tmp"))
    with lab(scratch) as made:
        yield made
    shutil.rmtree(scratch, ignore_errors=True)


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
    """What an agent does, with a link that lets a piece through every ``pause_s``."""

    def __init__(self, scene: Lab, state: PodState, pause_s: float) -> None:
        self._frozen = Agent(scene.a).copies.frozen(state)
        self._pause_s = pause_s
        self._stop = threading.Event()
        self.asked = 0
        self.errors: list[Exception] = []

    @contextlib.contextmanager
    def __call__(self, store: HostTargetStore) -> Iterator[None]:
        missing = store.missing()
        assert missing
        began = missing.bytes
        assert began > 80 << 20
        missing.hold()
        threads = [threading.Thread(target=self._try, args=(store, work)) for work in (
            self._serve, self._stream)]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            yield
            threads[1].join(60)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        assert not self.errors
        assert missing.bytes == 0
        assert missing.serving() is not Serving.BROKEN
        missing.let_go()
        self._frozen.close()
        print(f"{began >> 20} MiB were missing, {self.asked} pieces of them asked for")

    def _try(self, store: HostTargetStore, work: object) -> None:
        try:
            work(store)  # type: ignore[operator]
        except Exception as error:
            self.errors.append(error)

    def _serve(self, store: HostTargetStore) -> None:
        missing = store.missing()
        assert missing
        while not self._stop.is_set():
            for piece in missing.wanted(0.05):
                missing.arrived(piece, self._frozen.read(piece))
                self.asked += 1

    def _stream(self, store: HostTargetStore) -> None:
        missing = store.missing()
        assert missing
        for piece in missing.pieces(_PIECE_BYTES):
            time.sleep(self._pause_s)
            missing.arrived(piece, self._frozen.read(piece))


@pytest.mark.parametrize("turmoil", ["drop", "purge", "split", "move", "fork", ""])
def test_every_word_is_there(scene: Lab, tmp_path: Path, turmoil: str) -> None:
    state = start_turmoil(scene, tmp_path, *turmoil.split())
    fetching = Fetching(scene, state, 0.02)
    _, arrived = move(scene, state, scene.a, scene.b, allowance=_SENT_BYTES, fetching=fetching)
    assert fetching.asked
    assert not said(arrived.containers[0].init_pid, "wrong")
    wait_for_passes(arrived.containers[0].init_pid, 2)
