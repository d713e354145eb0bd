"""What a process calls itself and its files must not change what is read of it."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from godwit_agent.hostops import procs

# All that str.splitlines() splits at and the kernel does not escape, and a line that looks real.
NAMES = ["a\rb", "a\x0cb", "a\x0bb", "a\x1cb\x1d\x1e", "a\x85b", "a\u2028b", "a) R 1 2", "x y  z"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mapped_file_of_any_name_is_one_mapping(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    before = len(list(procs.mappings(os.getpid())))
    try:
        area = mmap.mmap(fd, 4096)
    finally:
        os.close(fd)
    found = list(procs.mappings(os.getpid()))
    assert f"{tmp_path}/{name}" in {item.name for item in found}
    assert len(found) >= before
    area.close()


@pytest.mark.parametrize("name", ["x\rPPid:\t1", "x\x0cNSpid:\t7", ") Z 1 (", "x\nState:\tT"])
def test_a_thread_of_any_name_is_what_it_is(name: str) -> None:
    pid, own = os.getpid(), threading.get_native_id()
    path = Path(f"/proc/{pid}/task/{own}/comm")
    former = path.read_bytes().rstrip(b"\n")
    try:
        path.write_bytes(name.encode())
        assert procs.vpid(pid)
        assert procs.status(pid, own)["PPid"] == str(os.getppid())
        assert procs.status(pid, own)["State"].startswith("R")
        assert "Z" not in procs.states(pid)
        assert procs.start_time(pid)
        assert not procs.is_zombie(pid)
        assert procs.processes(pid)[0].threads
    finally:
        path.write_bytes(former)
