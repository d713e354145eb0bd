"""When the runtime has done with a container that has ended."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath
from godwit_agent.hostops.pods import HostPods


def pods(tasks: Path) -> HostPods:
    return HostPods(Layout(host_pid=os.getpid(), tasks_dir=HostPath(str(tasks))))


def test_a_bundle_that_goes_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    timer = threading.Timer(0.1, (tmp_path / "a").rmdir)
    timer.start()
    assert pods(tmp_path).wait_forgotten(("a", "b"), 20)
    assert not (tmp_path / "a").exists()
    timer.join()


def test_a_bundle_that_stays_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert not pods(tmp_path).wait_forgotten(("a",), 0.05)
    assert pods(tmp_path / "none").wait_forgotten(("a",), 0.05)
