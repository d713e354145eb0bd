"""What a pod's containers were copied into a spool comes out of the archive, each its own."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.host import pod_state
from godwit_agent.archive import contents
from godwit_agent.archive.contents import Content, Entry
from godwit_agent.hostops import filerecords
from godwit_agent.hostops.checkpoints.spool import Spool
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath

PAGE = 4096
KEY = bytes(32)
NAMES = ("web", "side")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    layout = Layout(host_pid=os.getpid(), run_dir=HostPath(str(tmp_path)))
    (tmp_path / "store/uid").mkdir(parents=True)
    made = Spool(layout, "uid", NAMES)
    yield made
    made.close()
    assert list((tmp_path / "store/uid").iterdir()) == []


def _containers(tmp_path: Path) -> list[Container]:
    (like,) = pod_state("11111111-1111-1111-1111-111111111111").containers
    found = []
    for name in NAMES:
        bundle = tmp_path / f"bundle-{name}"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps({"of": name}))
        found.append(dataclasses.replace(like, name=name, bundle=HostPath(str(bundle))))
    return found


class _Seen(dict[str, bytes]):
    def take(self, name: str, size: int, content: Content) -> None:
        self[name] = content.read(size)


def test_containers_do_not_mix(spool: Spool, tmp_path: Path) -> None:
    for number, name in enumerate(NAMES, 1):
        there = array("Q", [PAGE, 4 * PAGE]).tobytes()
        spool.pages(name, 1, PAGE, memoryview(bytes([9]) * PAGE))
        spool.pages(name, 1, PAGE, memoryview(bytes([number]) * PAGE))  # a later round
        spool.zero(name, 1, 2 * PAGE, PAGE)
        spool.pages(name, 1, 8 * PAGE, memoryview(bytes(PAGE)))  # unmapped since
        ranges = filerecords.encode(Record(Kind.POPULATED, "", b".", number=1))
        spool.file(name, ranges, memoryview(there))
        spool.file(name, filerecords.encode(Record(Kind.DIRECTORY, "upper", b"d")), memoryview(b""))
        spool.image(name, "core-1.img", f"registers of {name}".encode())
    spool.sync()
    assert spool.bytes_sent > 4 * PAGE

    def entries() -> Iterator[Entry]:
        for one in _containers(tmp_path):
            yield from contents.of_container(one.name, spool.entries(one))

    file, seen = io.BytesIO(), _Seen()
    contents.write(file, KEY, entries(), {})
    file.seek(0)
    contents.read(file, KEY, seen)
    for number, name in enumerate(NAMES, 1):
        base = f"containers/{name}"
        assert json.loads(seen[f"{base}/spec.dump"]) == {"of": name}
        assert seen[f"{base}/checkpoint/core-1.img"] == f"registers of {name}".encode()
        assert json.loads(seen[f"{base}/godwit/pages/1.json"]) == {
            "data": [[PAGE, 2 * PAGE]],
            "zero": [[2 * PAGE, 3 * PAGE]],
        }
        assert seen[f"{base}/godwit/pages/1.img"] == bytes([number]) * PAGE
        kinds = [filerecords.decode(h).kind for h, _ in contents.records(_reader(seen, base))]
        assert kinds == [Kind.POPULATED, Kind.DIRECTORY]


def _reader(seen: _Seen, base: str) -> io.BytesIO:
    return io.BytesIO(seen[f"{base}/{contents.FILES}"])


def test_what_was_given_up_takes_no_more(spool: Spool) -> None:
    spool.abort()
    assert not spool.usable
    for work in (
        lambda: spool.pages("web", 1, 0, memoryview(bytes(PAGE))),
        spool.sync,
    ):
        with pytest.raises(OSError, match="given up"):
            work()
