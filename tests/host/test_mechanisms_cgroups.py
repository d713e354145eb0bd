"""Guard cgroups on this machine's v1 hierarchies and on v2 alone, with real processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from godwit_agent.hostops import devicefilter, procs
from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath
from godwit_agent.hostops.throttle import HostThrottles

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
BUSY = "while :; do :; done"


class Tree:
    """A cgroup made as a runtime makes it, seen from a mount namespace."""

    def __init__(self, mount: str) -> None:
        command = f"{mount}\necho ready\nexec sleep 1000"
        self.view = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", command], stdout=subprocess.PIPE, text=True
        )
        assert self.view.stdout
        ready = self.view.stdout.readline() == "ready\n"
        self.layout = Layout(host_pid=self.view.pid)
        self.base = self.layout.local("/sys/fs/cgroup")
        if not ready:
            self.close()
            pytest.skip("this machine cannot mount it")
        name = f"godwit-test-{uuid.uuid4().hex[:6]}"
        unified = (self.base / "cgroup.controllers").exists()
        names = [""] if unified else [p.name for p in self.base.iterdir() if not p.is_symlink()]
        self.home = {
            ("" if part in ("", "unified") else part if part != "systemd" else "name=systemd"): (
                f"/sys/fs/cgroup/{part}/{name}".replace("//", "/")
            )
            for part in names
            if (self.base / part / "cgroup.procs").exists()
        }
        path = HostPath("/nowhere")
        self.container = Container(name, "main", 0, path, path, path, None, self.home, (), ())
        for directory in self.directories():
            directory.mkdir()
            if (directory / "cpuset.cpus").exists() and not unified:
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (directory / file).write_text((directory.parent / file).read_text())

    def directories(self) -> Iterator[Path]:
        return (self.layout.local(path) for path in self.home.values())

    def run(self, *argv: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv)
        for directory in self.directories():
            (directory / "cgroup.procs").write_text(str(process.pid))
        return process

    def close(self) -> None:
        for directory in self.directories() if hasattr(self, "home") else ():
            for path in (directory / "inner", directory, directory.parent / "godwit"):
                with contextlib.suppress(OSError):
                    path.rmdir()
        self.view.kill()
        self.view.wait()
        assert self.view.stdout
        self.view.stdout.close()


@pytest.fixture(params=["machine", "v2"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    mount = "mount -t cgroup2 none /sys/fs/cgroup" if request.param == "v2" else ":"
    made = Tree(mount)
    yield made
    made.close()


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def advances(pid: int) -> bool:
    before = ticks(pid)
    time.sleep(0.4)
    return ticks(pid) > before


def test_guard_freeze_thaw_and_back(tree: Tree) -> None:
    cgroups, process = HostCgroups(tree.layout), tree.run("sh", "-c", BUSY)
    name = tree.container.id
    cgroups.guard(tree.container)
    cgroups.guard(tree.container)
    assert cgroups.pids(name) == (process.pid,)
    assert name in cgroups.list()
    assert not any((path / "cgroup.procs").read_text().split() for path in tree.directories())
    cgroups.freeze([name], 5)
    assert cgroups.frozen(name)
    assert not advances(process.pid)
    cgroups.thaw([name])
    assert not cgroups.frozen(name)
    assert advances(process.pid)
    assert not procs.ends(process.pid)
    cgroups.unguard(tree.container)
    assert name not in cgroups.list()
    assert all(
        (path / "cgroup.procs").read_text().split() == [str(process.pid)]
        for path in tree.directories()
    )
    process.kill()
    process.wait()


def test_who_was_killed_while_frozen_has_ended(tree: Tree) -> None:
    cgroups, process = HostCgroups(tree.layout), tree.run("sleep", "100")
    cgroups.guard(tree.container)
    cgroups.freeze([tree.container.id], 5)
    assert not procs.ends(process.pid)
    process.kill()
    assert procs.ends(process.pid)
    cgroups.thaw([tree.container.id])
    assert process.wait() == -9
    cgroups.kill([tree.container.id])


def test_processes_in_inner_cgroups_come_along(tree: Tree) -> None:
    cgroups, process = HostCgroups(tree.layout), tree.run("sleep", "100")
    for directory in tree.directories():
        inner = directory / "inner"
        inner.mkdir()
        if (inner / "cpuset.cpus").exists():
            for file in ("cpuset.cpus", "cpuset.mems"):
                (inner / file).write_text((directory / file).read_text())
        (inner / "cgroup.procs").write_text(str(process.pid))
    cgroups.guard(tree.container)
    assert cgroups.pids(tree.container.id) == (process.pid,)
    cgroups.kill([tree.container.id])
    process.wait()


def test_frozen_processes_are_killed(tree: Tree) -> None:
    cgroups, process = HostCgroups(tree.layout), tree.run("sleep", "100")
    cgroups.guard(tree.container)
    cgroups.freeze([tree.container.id], 5)
    done: Callable[[], int] = process.wait
    cgroups.kill([tree.container.id])
    assert done() == -9
    assert tree.container.id not in cgroups.list()
    cgroups.kill([tree.container.id])


def share_of_a_cpu(pid: int) -> float:
    before, begin = ticks(pid), time.monotonic()
    time.sleep(1.0)
    return (ticks(pid) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin)


def test_cpu_time_is_limited_kept_in_the_guard_and_given_back(tree: Tree, tmp_path: Path) -> None:
    layout = replace(tree.layout, run_dir=HostPath(str(tmp_path)))
    throttles, cgroups = HostThrottles(layout), HostCgroups(layout)
    limits = [p for d in tree.directories() for n in ("cpu.max", "cpu.cfs_quota_us")
              if (p := d / n).exists()]  # fmt: skip
    if not limits:
        pytest.skip("no CPU controller here")
    before = [path.read_text() for path in limits]
    process = tree.run("sh", "-c", BUSY)
    try:
        used = throttles.used_seconds(tree.container)
        throttles.limit(tree.container, 0.5)
        throttles.limit(tree.container, 0.1)
        assert [path.read_text() for path in limits] != before
        assert share_of_a_cpu(process.pid) < 0.3
        assert throttles.used_seconds(tree.container) > used
        cgroups.guard(tree.container)
        assert share_of_a_cpu(process.pid) < 0.3
        HostThrottles(layout).lift_all()  # as after a restart
        assert [path.read_text() for path in limits] == before
        guards = [path.parent.parent / "godwit" / path.parent.name / path.name for path in limits]
        assert [path.read_text() for path in guards] == before
        assert not list((tmp_path / "throttle").iterdir())
        throttles.limit(tree.container, 0.1)
        cgroups.unguard(tree.container)
        throttles.lift(tree.container)
        assert [path.read_text() for path in limits] == before
    finally:
        process.kill()
        process.wait()


def load_program() -> int:
    """BPF: return 1 (allowed). struct bpf_insn: opcode, registers, offset, value."""
    program = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)
    code = ctypes.create_string_buffer(program, len(program))
    word = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII", 15, 2, ctypes.addressof(code), ctypes.addressof(word), 0, 0, 0, 0, 0
    )
    return devicefilter._bpf(5, attributes)


def test_device_programs_come_along_on_v2() -> None:
    tree = Tree("mount -t cgroup2 none /sys/fs/cgroup")
    try:
        (home,) = tree.directories()
        try:
            program = load_program()
        except OSError as error:
            pytest.skip(f"no device programs on this kernel: {error}")
        fd = os.open(home, os.O_RDONLY)
        devicefilter._bpf(8, struct.pack("=IIIII", fd, program, 6, 2, 0))
        os.close(fd)
        os.close(program)
        cgroups, process = HostCgroups(tree.layout), tree.run("sleep", "100")
        cgroups.guard(tree.container)
        guard = home.parent / "godwit" / tree.container.id
        assert devicefilter.attached(guard) == devicefilter.attached(home)
        assert len(devicefilter.attached(guard)) == 1
        cgroups.guard(tree.container)
        assert len(devicefilter.attached(guard)) == 1
        cgroups.kill([tree.container.id])
        process.wait()
    finally:
        tree.close()
