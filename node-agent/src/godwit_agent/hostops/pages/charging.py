"""Whose memory a page of shared memory is: that of the cgroup whose process used it first.

The kernel counts a page where it was allocated, for good (admin-guide/cgroup-v2.rst, Memory
Ownership). What the agent receives for a pod would be the agent's own as long as the pod
lives, and the pod's limit would not hold. So a process in the pod's sandbox copies it once.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Sandbox

_TIMEOUT_S = 120.0
# Waits for a line, so that it does nothing before it has been moved.
_COPY = """
import os, sys
sys.stdin.readline()
source, target, size = (int(word) for word in sys.argv[1:])
at = 0
while at < size:
    try:
        at = os.lseek(source, at, os.SEEK_DATA)
        end = os.lseek(source, at, os.SEEK_HOLE)
    except OSError as error:
        if error.errno != 6:
            raise
        break
    os.lseek(target, at, os.SEEK_SET)
    while at < end:
        sent = os.sendfile(target, source, at, end - at)
        if not sent:
            sys.exit(1)
        at += sent
"""


def place_of(layout: Layout, sandbox: Sandbox) -> Path | None:
    """Directory of the cgroup that counts the sandbox's memory."""
    for controller in ("memory", ""):
        if controller in sandbox.cgroups:
            path = layout.local(sandbox.cgroups[controller])
            if (path / "cgroup.procs").exists():
                return path
    return None


def copy_within(place: Path, source: int, target: int, size: int) -> bool:
    """Copies ``size`` bytes between two memfds, as a process of the cgroup ``place``; False if
    that cannot be done."""
    argv = [sys.executable, "-I", "-S", "-c", _COPY, str(source), str(target), str(size)]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        child = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(source, target),
            env={},
        )
        try:
            (place / "cgroup.procs").write_text(str(child.pid))
            child.communicate(b"\n", timeout=_TIMEOUT_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        return child.returncode == 0
    return False
