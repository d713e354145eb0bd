"""When the runtime has done with a container that has ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

from fakes.host import pod_state
from godwit_agent.hostops.criu.restore import given_up
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


def test_a_container_without_a_bundle_was_given_up(tmp_path: Path) -> None:
    layout = Layout(host_pid=os.getpid(), tasks_dir=HostPath(str(tmp_path / "tasks")))
    assert not given_up(layout, "a")
    (tmp_path / "tasks" / "b").mkdir(parents=True)
    assert not given_up(layout, "b")
    assert given_up(layout, "a")


def test_a_container_that_was_asked_to_end_was_given_up(tmp_path: Path) -> None:
    layout = Layout(host_pid=os.getpid(), run_dir=HostPath(str(tmp_path)))
    (tmp_path / "restored").mkdir()
    assert not given_up(layout, "a")
    (tmp_path / "restored/a.killed").touch()
    assert given_up(layout, "a")


def test_a_container_has_ended_when_its_first_process_has(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "init.pid").write_text(str(process.pid))
    state = pod_state("uid")
    container = replace(state.containers[0], id="a", init_pid=process.pid)
    state = replace(state, containers=(container,))
    assert pods(tmp_path).ended(state) == ()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert pods(tmp_path).ended(state) == (container.name,), "nobody has waited for it yet"
    process.wait()
    assert pods(tmp_path).ended(state) == (container.name,)
    shutil.rmtree(tmp_path / "a")
    assert pods(tmp_path).ended(state) == (container.name,)
