"""A container's log on its way: appended to what the runtime has open, never replaced."""

from __future__ import annotations

import os
from pathlib import Path

from godwit_agent.hostops.filerecords import LOG, Record
from godwit_agent.hostops.files.containerlog import LogCopier, directory_of
from godwit_agent.hostops.files.filetarget import TargetFiles
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath, PodState, Sandbox

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def successor(name: str = "app") -> PodState:
    container = Container(
        "cid", name, 1, HostPath("/b"), HostPath("/r"), HostPath("/rootfs"), None, {}, (), ()
    )
    sandbox = Sandbox("sid", 1, HostPath("/netns"), 1)
    return PodState("uid", "ns", "pod", sandbox, (container,), None)


def test_log_is_appended_to(tmp_path: Path) -> None:
    class Rooted(Layout):
        @property
        def root(self) -> Path:
            return tmp_path

    layout = Rooted()
    source, staging = tmp_path / "source", tmp_path / "staging"
    logs = tmp_path / directory_of(successor(), "app").lstrip("/")
    for path in (source, staging, logs):
        path.mkdir(parents=True)
    (source / "1.log").write_text("of an earlier start\n")
    (source / "2.log").write_text("one\n")
    (source / "2.log.20260101-000000").write_text("rotated\n")
    target = TargetFiles(layout, {"app": "/staging"})
    copier = LogCopier(os.open(source, _DIRECTORY))

    def emit(record: Record, body: bytes | memoryview) -> None:
        assert record.tree == LOG
        target.apply("app", record, memoryview(body))

    def round_() -> None:
        copier.run(emit, frozenset(), lambda: False)

    round_()
    with (logs / "0.log").open("ab") as runtime:  # as containerd has it open
        target.bind(successor())
        with (source / "2.log").open("a") as file:
            file.write("two\n")
        round_()
        round_()
        runtime.write(b"three\n")
    assert (logs / "0.log").read_text() == "one\ntwo\nthree\n"
    assert [path.name for path in logs.iterdir()] == ["0.log"]
    copier.close()
    target.close()


def test_log_that_is_rotated_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text("long ago\n" * 10)
    copier = LogCopier(os.open(tmp_path, _DIRECTORY))
    got: list[tuple[int, int, bytes]] = []

    def emit(record: Record, body: bytes | memoryview) -> None:
        got.append((record.size, record.number, bytes(body)))

    copier.run(emit, frozenset(), lambda: False)
    (tmp_path / "0.log").rename(tmp_path / "0.log.1")
    (tmp_path / "0.log").write_text("new\n")
    got.clear()
    copier.run(emit, frozenset(), lambda: False)
    assert got[0][0] == 4
    assert got[1:] == [(0, 0, b"new\n")]
    copier.close()


def test_container_without_a_log(tmp_path: Path) -> None:
    copier = LogCopier(os.open(tmp_path, _DIRECTORY))
    copier.run(lambda *_: None, frozenset(), lambda: False)
    copier.close()
