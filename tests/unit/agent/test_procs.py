"""What a process calls itself and its files must not change what is read of it."""

from __future__ import annotations

import mmap
import os
import subprocess
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


def proc(root: Path, pid: int, parent: int, *children: int, threads: bool = True) -> None:
    """A process as /proc shows it; ``threads``: it is not gone yet."""
    text = f"PPid:\t{parent}\nNSpid:\t{pid}\t{pid - 100}\nNSpgid:\t101\t1\nNSsid:\t101\t1\n"
    task = root / str(pid) / "task" / str(pid)
    (task if threads else root / str(pid)).mkdir(parents=True)
    (root / str(pid) / "status").write_text(text)
    if threads:
        (task / "status").write_text(text)
        (task / "children").write_text(" ".join(map(str, children)))


def test_a_process_that_ends_while_it_is_looked_at_is_no_second_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procs, "_PROC", tmp_path)
    proc(tmp_path, 101, 1, 102, 103, 104, 106)
    proc(tmp_path, 102, 101)
    proc(tmp_path, 103, 0)  # being reaped: no parent any more
    proc(tmp_path, 104, 0, 105)
    proc(tmp_path, 105, 104)
    proc(tmp_path, 106, 101, threads=False)
    found = procs.processes(101)
    assert [(one.pid, one.ppid, one.threads) for one in found] == [(1, 0, (1,)), (2, 1, (2,))]


def test_a_process_comes_before_its_threads_when_numbers_have_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procs, "_PROC", tmp_path)
    proc(tmp_path, 32767, 1)
    for thread in (300, 301):
        task = tmp_path / f"32767/task/{thread}"
        task.mkdir()
        (task / "status").write_text(f"NSpid:\t{thread}\t{thread - 298}\n")
        (task / "children").write_text("")
    (found,) = procs.processes(32767)
    assert found.threads == (found.pid, 2, 3)


def test_what_is_forked_and_ends_all_the_time_never_makes_a_second_root() -> None:
    """As a shell's commands do; a process of its own, whose children are nobody else's."""
    script = "while :; do (exit 0) & (exit 0); done"
    with subprocess.Popen(["bash", "-c", script]) as shell:
        try:
            for _ in range(300):
                found = procs.processes(shell.pid)
                known = {one.pid for one in found}
                assert [one.pid for one in found if one.ppid not in known] == [shell.pid]
        finally:
            shell.kill()
