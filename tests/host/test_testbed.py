"""A testbed comes up after anything, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "testbed" / "testbed"
NAME = "hosttest"

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and mounts need root"),
]


def testbed(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(TESTBED), words[0], "--name", NAME, *words[1:]]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


testbed.__test__ = False  # type: ignore[attr-defined]


def traces() -> set[str]:
    """Everything on this machine that carries the testbed's name."""
    found = {f"netns {file.name}" for file in Path("/run/netns").glob(f"gtb-{NAME}-*")}
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found |= {f"mount {line}" for line in mounts if f"/{NAME}/" in line}
    hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")]
    for hierarchy in hierarchies:
        found |= {f"cgroup {file}" for file in hierarchy.glob(f"godwit-testbed-{NAME}")}
    for base in ("/run/godwit-testbed", "/var/lib/godwit-testbed"):
        found |= {f"directory {file}" for file in Path(base).glob(NAME)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"/{NAME}/" in (process / "cgroup").read_text():
                found.add(f"process {process.name}")
    return found


@pytest.fixture(autouse=True)
def _gone_before_and_after() -> object:
    testbed("down")
    assert not traces()
    yield
    testbed("down")
    assert not traces()


def test_up_status_down() -> None:
    up = testbed("up", "--nodes", "1")
    assert up.returncode == 0, up.stderr
    assert "Ready" in testbed("status").stdout
    again = testbed("up", "--nodes", "1")
    assert again.returncode == 0, again.stderr
    assert "is up" in again.stderr
    other = testbed("up", "--nodes", "2")
    assert other.returncode == 1
    assert "testbed down" in other.stderr
    assert traces()


def test_up_after_a_crash_half_way() -> None:
    argv = [str(TESTBED), "up", "--name", NAME, "--nodes", "1"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True)
    pid_file = Path(f"/run/godwit-testbed/{NAME}/pids/cp")
    deadline = time.monotonic() + 600  # the first time it builds Kubernetes
    while not pid_file.exists():
        assert process.poll() is None, "it has come up before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert traces()
    up = testbed("up", "--nodes", "1")
    assert up.returncode == 0, up.stderr
    assert "Ready" in testbed("kubectl", "get", "nodes").stdout


def test_errors_name_the_way_out() -> None:
    missing = testbed("kubectl", "get", "nodes")
    assert missing.returncode == 1
    assert f"testbed up --name {NAME}" in missing.stderr
