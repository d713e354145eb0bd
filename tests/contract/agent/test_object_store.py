"""Archives are complete under their name or not there, in a directory and in a real S3 store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from fakes.authority import Authority
from godwit_agent.archive import contents
from godwit_agent.hostops.checkpoints.archives import Archives, Directory
from godwit_agent.hostops.checkpoints.objectstore import ObjectStore, Upload
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.objectstores import Store
from godwit_api.reasons import Reason
from lab.objectstore import BUCKET, PREFIX, USER, Certificate, Server

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
T = TypeVar("T")
KEY = bytes(range(32))
PART = 5 << 20  # the least that S3 takes of any part but the last
LONG = os.urandom(1 << 20) * 12


@dataclass
class Place:
    """Archives of one kind, and where they really are."""

    archives: Archives
    call: Callable[[Callable[[], T]], T]
    shown: Callable[[], list[str]]
    hidden: Callable[[], list[str]]
    damage: Callable[[bytes], None]  # gives ns/one other content

    def write(self, data: bytes, name: str = "one") -> None:
        def work() -> None:
            draft = self.archives.begin("ns", name, len(data))
            try:
                for at in range(0, len(data), 1 << 20):
                    draft.write(data[at : at + (1 << 20)])
                assert draft.tell() == len(data)
                draft.commit()
            finally:
                draft.discard()

        self.call(work)

    def read(self, name: str = "one", piece: int = (1 << 20) + 16) -> bytes:
        def work() -> bytes:
            with self.archives.read("ns", name) as file:
                found = b"".join(iter(lambda: file.read(piece), b""))
                assert file.tell() == len(found)
                return found

        return self.call(work)

    def refused(self, work: Callable[[], object]) -> GodwitError:
        with pytest.raises(GodwitError) as caught:
            self.call(work)
        return caught.value


@pytest.fixture(scope="module")
def lan() -> Iterator[NetnsThread]:
    thread = NetnsThread(private=True)
    yield thread
    thread.close()


def _serve(lan: NetnsThread, directory: Path, port: int, *, tls: bool) -> Server:
    authority, certificate = Authority(), None
    if tls:
        identity = authority.identity("127.0.0.1")
        certificate = Certificate(identity.certificate_pem, identity.key_pem, authority.pem)
    server = Server(directory, f"127.0.0.1:{port}", ["nsenter", f"--net={lan.path}"], certificate)
    server.start()
    return server


@pytest.fixture(scope="module")
def plain(lan: NetnsThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = _serve(lan, tmp_path_factory.mktemp("plain"), 9000, tls=False)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def secured(lan: NetnsThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = _serve(lan, tmp_path_factory.mktemp("secured"), 9443, tls=True)
    yield server
    server.stop()


def _store(server: Server) -> Store:
    return Store(server.endpoint, BUCKET, PREFIX, "us-east-1", USER, server.secret, server.ca_pem)


def _bucket(lan: NetnsThread, server: Server) -> Place:
    for key in server.objects():
        server.object(key).unlink()
    return Place(
        ObjectStore(_store(server), part_bytes=PART),
        lan.call,
        server.objects,
        server.unfinished,
        server.object(f"{PREFIX}/ns/one.godwit").write_bytes,
    )


@pytest.fixture(params=["directory", "plain", "secured"])
def place(request: pytest.FixtureRequest, lan: NetnsThread, tmp_path: Path) -> Place:
    if request.param != "directory":
        return _bucket(lan, request.getfixturevalue(request.param))
    root = tmp_path / PREFIX

    def shown() -> list[str]:
        paths = (str(path.relative_to(tmp_path)) for path in root.rglob("*.godwit"))
        return sorted(paths)

    return Place(
        Directory(Layout(host_pid=os.getpid()), str(root)),
        lambda work: work(),
        shown,
        lambda: [str(path) for path in root.rglob("*.partial")],
        (root / "ns/one.godwit").write_bytes,
    )


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, len(LONG)])
def test_what_went_in_comes_out(place: Place, size: int) -> None:
    place.write(LONG[:size])
    assert place.read() == LONG[:size]
    assert place.shown() == [f"{PREFIX}/ns/one.godwit"]
    assert place.hidden() == []
    assert place.call(lambda: place.archives.exists("ns", "one"))


def test_nothing_is_seen_before_it_is_complete_and_nothing_stays(place: Place) -> None:
    draft = place.call(lambda: place.archives.begin("ns", "one", 0))
    place.call(lambda: draft.write(LONG))
    assert not place.call(lambda: place.archives.exists("ns", "one"))
    assert place.shown() == []
    assert place.hidden()
    place.call(draft.discard)
    place.call(draft.discard)
    assert place.hidden() == []
    assert place.shown() == []


def test_what_a_process_that_died_has_left_is_removed(place: Place) -> None:
    place.write(b"another", "two")
    draft = place.call(lambda: place.archives.begin("ns", "one", 0))
    place.call(lambda: draft.write(LONG))
    if isinstance(draft, Upload):
        draft._worker.shutdown()  # with the process its requests end
    assert place.hidden()
    place.call(lambda: place.archives.clean("ns", "one"))
    assert place.hidden() == []
    assert place.read("two") == b"another"
    place.call(draft.discard)


def test_another_one_is_never_replaced(place: Place) -> None:
    place.write(b"the first")
    with pytest.raises(Rejected) as refused:
        place.write(b"the second")
    assert refused.value.reason is Reason.ARCHIVE_EXISTS
    assert place.read() == b"the first"
    assert place.hidden() == []


def test_what_is_not_there_is_not_found(place: Place) -> None:
    assert not place.call(lambda: place.archives.exists("ns", "one"))
    with pytest.raises(Rejected) as refused:
        place.read()
    assert refused.value.reason is Reason.ARCHIVE_NOT_FOUND


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1000], Reason.ARCHIVE_DAMAGED),
        (lambda data: data[: -len(data) // 2], Reason.ARCHIVE_DAMAGED),
        (lambda data: data[:5000] + b"x" + data[5001:], Reason.ARCHIVE_DAMAGED),
        (lambda data: b"PK" + data, Reason.ARCHIVE_FOREIGN),
        (lambda _: b"", Reason.ARCHIVE_FOREIGN),
    ],
)
def test_a_damaged_one_is_refused_by_name(
    place: Place, change: Callable[[bytes], bytes], reason: Reason
) -> None:
    def write() -> None:
        draft = place.archives.begin("ns", "one", 0)
        contents.write(draft, KEY, [contents.whole("checkpoint/x.img", LONG[: PART // 2])], {})
        draft.commit()

    def verify() -> None:
        with place.archives.read("ns", "one") as file:
            contents.verify(file, KEY)

    place.call(write)
    place.call(verify)
    place.damage(change(place.read()))
    assert place.refused(verify).reason is reason


@pytest.mark.parametrize("name", ["../one", "a/b", "", ".one", "a..b", "One"])
def test_a_name_leads_nowhere_else(place: Place, name: str) -> None:
    for work in (
        lambda: place.archives.exists("ns", name),
        lambda: place.archives.begin("ns", name, 0),
        lambda: place.archives.clean("ns", name),
    ):
        assert place.refused(work).reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"bucket": "no-such-bucket"},
        {"secret_key": "wrong"},
        {"access_key": "nobody"},
        {"prefix": "other"},
    ],
)
def test_what_the_store_refuses_is_told_before_anything_is_written(
    lan: NetnsThread, plain: Server, change: dict[str, str]
) -> None:
    place = _bucket(lan, plain)
    place.archives = ObjectStore(replace(_store(plain), **change))
    failure = place.refused(lambda: place.archives.begin("ns", "one", 0))
    assert (type(failure), failure.reason) == (Rejected, Reason.ARCHIVE_STORE)
    assert plain.endpoint in failure.message
    assert plain.secret not in failure.message
    assert place.hidden() == []


def test_a_server_that_nobody_vouches_for_gets_nothing(lan: NetnsThread, secured: Server) -> None:
    place = _bucket(lan, secured)
    for ca_pem in (Authority().pem.decode(), ""):
        place.archives = ObjectStore(replace(_store(secured), ca_pem=ca_pem))
        failure = place.refused(lambda: place.archives.begin("ns", "one", 0))
        assert (type(failure), failure.reason) == (Rejected, Reason.ARCHIVE_STORE)
        assert "ca.crt" in failure.message


def test_a_server_that_is_away_may_come_back(lan: NetnsThread, plain: Server) -> None:
    place = _bucket(lan, plain)
    place.write(LONG)

    def read_while_it_restarts() -> bytes:
        with place.archives.read("ns", "one") as file:
            data = file.read(1 << 20)
            plain.stop()
            plain.start_again()
            return data + b"".join(iter(lambda: file.read(1 << 20), b""))

    assert place.call(read_while_it_restarts) == LONG
    plain.stop()
    try:
        failure = place.refused(lambda: place.archives.exists("ns", "one"))
        assert (type(failure), failure.reason) == (Retryable, Reason.ARCHIVE_STORE_UNREACHABLE)
    finally:
        plain.start_again()
    assert place.read() == LONG


def test_an_archive_that_is_replaced_while_it_is_read_is_no_archive(
    lan: NetnsThread, plain: Server
) -> None:
    place = _bucket(lan, plain)
    place.write(LONG)

    def read() -> None:
        with place.archives.read("ns", "one") as file:
            file.read(1 << 20)
            plain.object(f"{PREFIX}/ns/one.godwit").unlink()
            plain.stop()
            plain.start_again()
            while file.read(1 << 20):
                pass

    failure = place.refused(read)
    assert (type(failure), failure.reason) == (Rejected, Reason.ARCHIVE_DAMAGED)


def test_memory_does_not_grow_with_the_archive(lan: NetnsThread, plain: Server) -> None:
    """The parts that are on their way, and no more: 96 MiB go through."""
    place = _bucket(lan, plain)
    draft = place.call(lambda: place.archives.begin("ns", "one", 0))
    piece = LONG[: 1 << 20]
    most = 0
    for _ in range(96):
        place.call(lambda: draft.write(piece))
        most = max(most, len(draft._buffer))  # type: ignore[attr-defined]
    place.call(draft.commit)
    assert most < PART
    assert place.call(lambda: place.archives._bucket.stat(f"{PREFIX}/ns/one.godwit"))[0] == 96 << 20  # type: ignore[attr-defined,index]
