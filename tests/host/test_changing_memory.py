"""A process that changes the layout of its memory while its pages still come finds every word.

The page daemon answers faults, hears of pages that are dropped, unmapped and moved, and of
children, all at once (userfaultfd(2)); what goes wrong there is memory that reads as zero.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from host.lab import BASE, ROOT, Lab
from host.test_kernel_objects import IP, move
from host.test_mechanisms import Agent

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not BASE.exists(), reason=f"no {BASE}"),
]


def said(pid: int, name: str) -> str:
    path = Path(f"/proc/{pid}/root/data/{name}")
    return path.read_text() if path.exists() else ""


def wait_for_passes(pid: int, more: int) -> None:
    goal = int(said(pid, "passes") or 0) + more
    deadline = time.monotonic() + 60
    while int(said(pid, "passes") or 0) < goal:
        assert not said(pid, "wrong"), said(pid, "wrong")
        assert Path(f"/proc/{pid}/root/data").exists(), "the process is gone"
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.02)


@pytest.mark.parametrize("turmoil", ["drop", "purge", "split", "move", "fork", ""])
def test_every_word_is_there(scene: Lab, tmp_path: Path, turmoil: str) -> None:
    source = ROOT / "lab/turmoil/turmoil.c"
    argv = ["gcc", "-O2", "-static", "-pthread", "-o", str(tmp_path / "turmoil"), str(source)]
    subprocess.run(argv, check=True)
    pod = scene.sandbox(scene.a, IP)
    scene.start(pod, ["/lab/turmoil", "/data", *turmoil.split()], tmp_path)
    scene.a.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
    state = Agent(scene.a).pods.find(pod.uid)
    wait_for_passes(state.containers[0].init_pid, 1)
    _, arrived = move(scene, state, scene.a, scene.b)
    wait_for_passes(arrived.containers[0].init_pid, 2)
