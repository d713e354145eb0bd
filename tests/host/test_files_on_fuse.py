"""Files on a FUSE file system whose daemon holds back what is written, and whose server locks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.files import netfiles
from godwit_agent.hostops.files.netfiles import Unwritten
from host import fuse

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE"),
]

WRITES = "f = open({path!r}, 'wb', buffering=0); f.write(b'written')"
MAPS = """
import mmap, os
fd = os.open({path!r}, os.O_RDWR)
os.truncate(fd, 8192)
area = mmap.mmap(fd, 8192)
os.close(fd)
area[4096:4102] = b'mapped'
"""
LOCKS = """
import fcntl
f = open({path!r}, 'r+b')
fcntl.lockf(f, fcntl.LOCK_EX)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, fuse.Daemon]]:
    with fuse.mounted(tmp_path) as daemon:
        yield tmp_path / "file", daemon


@contextlib.contextmanager
def process(script: str, path: Path) -> Iterator[int]:
    """One that has run ``script`` and waits; this one must not touch the maps of its own
    daemon."""
    text = script.format(path=str(path)) + "\nprint('done', flush=True)\ninput()"
    command = (sys.executable, "-c", text)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stdout.readline() == b"done\n"
        yield running.pid
        running.kill()


@pytest.mark.parametrize(("script", "content"), [(WRITES, b"written"), (MAPS, b"mapped")])
def test_reaches_the_server_by_a_flush(
    served: tuple[Path, fuse.Daemon], script: str, content: bytes
) -> None:
    path, daemon = served
    with process(script, path) as pid:
        unwritten = Unwritten([pid])
        descriptors = len(os.listdir("/proc/self/fd"))
        os.sync()
        assert content not in daemon.server
        unwritten.flush()
        assert content in daemon.server
        assert len(os.listdir("/proc/self/fd")) == descriptors
        unwritten.close()


@pytest.mark.parametrize("named", [None, 3])
def test_name_that_another_client_has_changed(
    served: tuple[Path, fuse.Daemon], named: int | None
) -> None:
    path, daemon = served
    with process(WRITES, path) as pid:
        ((number, target),) = [it for it in procs.descriptors(pid) if it[1] == str(path)]
        assert not list(netfiles.misnamed(pid, number, target))
        daemon.named = named
        (told,) = netfiles.misnamed(pid, number, target)
        assert str(path) in told
    assert not list(netfiles.misnamed(pid, number, target))


def test_lock_that_only_the_server_knows(served: tuple[Path, fuse.Daemon]) -> None:
    path, daemon = served
    with process(LOCKS, path) as pid:
        assert daemon.locks
        known = netfiles.mounts(procs.read(pid, "mountinfo"))
        ((number, target),) = [it for it in procs.descriptors(pid) if it[1] == str(path)]
        info = procs.read(pid, f"fdinfo/{number}")
        assert not list(netfiles.faults(target, info, known))
        (told,) = netfiles.locked_at_server(pid, number, target)
        assert "holds a lock" in told
        assert daemon.locks  # asking has not taken it
    with process(WRITES, path) as pid:
        ((number, target),) = [it for it in procs.descriptors(pid) if it[1] == str(path)]
        assert not list(netfiles.locked_at_server(pid, number, target))
