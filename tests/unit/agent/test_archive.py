"""An archive gives back what went in, and notices everything else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit_agent.archive import contents, sealed
from godwit_agent.archive.contents import Entry
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

KEY = bytes(range(32))
PAGE = 4096


class Kept:
    """Remembers what a store would have got."""

    def __init__(self) -> None:
        self.containers: set[str] = set()
        self.memory: dict[tuple[int, int], bytes] = {}
        self.images: dict[str, bytes] = {}
        self.records: list[tuple[bytes, bytes]] = []

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self.containers.add(container)
        for at in range(0, len(data), PAGE):
            self.memory[vpid, vaddr + at] = bytes(data[at : at + PAGE])

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        for at in range(0, length, PAGE):
            self.memory[vpid, vaddr + at] = bytes(PAGE)

    def image(self, container: str, name: str, offset: int, total: int, data: memoryview) -> None:
        self.images[name] = self.images.get(name, b"")[:offset] + bytes(data)
        assert len(self.images[name]) <= total

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self.containers.add(container)
        self.records.append((header, bytes(body)))


def _entries(pages: dict[int, int], records: list[tuple[bytes, bytes]]) -> list[Entry]:
    ranges = tuple((n * PAGE, (n + 1) * PAGE) for n in sorted(pages))
    content = iter([bytes([pages[n]]) * PAGE for n in sorted(pages)])
    log = b"".join(contents.record(*one) for one in records)
    return [
        contents.whole("config.dump", b"{}"),
        contents.whole("checkpoint/core-1.img", b"registers"),
        *contents.page_entries(1, ranges, ((0, PAGE),), content),
        contents.whole(contents.FILES, log),
    ]


def _archive() -> bytes:
    file = io.BytesIO()
    contents.write(file, KEY, _entries({3: 7, 9: 8}, [(b"head", b"body")]), {"pod": "redis"})
    return file.getvalue()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(1, 600), st.integers(1, 255), max_size=600),
    st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=5000)), max_size=8),
)
def test_what_went_in_comes_out(pages: dict[int, int], records: list[tuple[bytes, bytes]]) -> None:
    file, kept = io.BytesIO(), Kept()
    contents.write(file, KEY, _entries(pages, records), {"pod": "redis"})
    file.seek(0)
    assert contents.load(file, KEY, ("main",), kept)["pod"] == "redis"
    expected = {(1, n * PAGE): bytes([value]) * PAGE for n, value in pages.items()}
    assert kept.memory == {**expected, (1, 0): bytes(PAGE)}
    assert kept.images == {"core-1.img": b"registers"}
    assert kept.records == records


def test_each_container_gets_its_own() -> None:
    class Apart(dict[str, Kept]):
        def __missing__(self, name: str) -> Kept:
            self[name] = Kept()
            return self[name]

        def pages(self, container: str, *rest: Any) -> None:
            self[container].pages(container, *rest)

        def zero(self, container: str, *rest: Any) -> None:
            self[container].zero(container, *rest)

        def image(self, container: str, *rest: Any) -> None:
            self[container].image(container, *rest)

        def file(self, container: str, *rest: Any) -> None:
            self[container].file(container, *rest)

    def entries() -> Iterator[Entry]:
        yield contents.whole(contents.POD, b"{}")
        for number, name in enumerate(("web", "side-car"), 1):
            own = _entries({number: number}, [(name.encode(), b"body")])
            yield from contents.of_container(name, own)

    file, kept = io.BytesIO(), Apart()
    contents.write(file, KEY, entries(), {"containers": ["web", "side-car"]})
    file.seek(0)
    about = contents.verify(file, KEY)
    file.seek(0)
    assert contents.load(file, KEY, contents.containers_of(about), kept) == about
    for number, name in enumerate(("web", "side-car"), 1):
        assert kept[name].memory == {
            (1, number * PAGE): bytes([number]) * PAGE,
            (1, 0): bytes(PAGE),
        }
        assert kept[name].records == [(name.encode(), b"body")]
    assert set(kept) == {"web", "side-car"}


def test_an_archive_of_the_first_format_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One container, whose entries lie at the top."""
    monkeypatch.setattr(sealed, "FORMAT", 1)
    file, kept = io.BytesIO(), Kept()
    contents.write(file, KEY, _entries({3: 7}, [(b"head", b"body")]), {"container": "main"})
    file.seek(0)
    about = contents.verify(file, KEY)
    file.seek(0)
    contents.load(file, KEY, contents.containers_of(about), kept)
    assert kept.containers == {"main"}
    assert kept.memory[1, 3 * PAGE] == bytes([7]) * PAGE


def test_a_later_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "FORMAT", 3)
    assert _refused(_archive()) is Reason.ARCHIVE_FOREIGN


_GOOD = _archive()


def _refused(data: bytes, key: bytes = KEY) -> Reason:
    with pytest.raises(Rejected) as refused:
        contents.verify(io.BytesIO(data), key)
    return refused.value.reason


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(_GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    bad = bytearray(_GOOD)
    bad[at] ^= change
    assert _refused(bytes(bad)) in (
        Reason.ARCHIVE_DAMAGED,
        Reason.ARCHIVE_FOREIGN,
        Reason.ARCHIVE_KEY,
    )


def test_every_changed_byte_of_the_header_is_noticed() -> None:
    for at in range(len(sealed.MAGIC) + 160):
        bad = bytearray(_GOOD)
        bad[at] ^= 0x20
        _refused(bytes(bad))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(_GOOD) - 1))
def test_a_cut_is_noticed(length: int) -> None:
    _refused(_GOOD[:length])


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=100))
def test_something_appended_is_noticed(more: bytes) -> None:
    assert _refused(_GOOD + more) is Reason.ARCHIVE_DAMAGED


def test_a_cut_between_two_chunks_is_noticed() -> None:
    file = io.BytesIO()
    writer = sealed.SealedWriter(file, KEY)
    begin = file.tell()
    writer.write(bytes(3 * sealed.CHUNK))
    writer.finish()
    for chunks in (1, 2):
        cut = file.getvalue()[: begin + chunks * (sealed.CHUNK + 16)]
        reader = sealed.SealedReader(io.BytesIO(cut), KEY)
        with pytest.raises(Rejected):
            reader.read()


def test_exchanged_chunks_are_noticed() -> None:
    file = io.BytesIO()
    writer = sealed.SealedWriter(file, KEY)
    begin = file.tell()
    writer.write(bytes(3 * sealed.CHUNK))
    writer.finish()
    data, size = file.getvalue(), sealed.CHUNK + 16
    swapped = (
        data[:begin]
        + data[begin + size : begin + 2 * size]
        + data[begin : begin + size]
        + data[begin + 2 * size :]
    )
    with pytest.raises(Rejected):
        sealed.SealedReader(io.BytesIO(swapped), KEY).read()


def test_another_key_is_named_as_such() -> None:
    assert _refused(_GOOD, bytes(32)) is Reason.ARCHIVE_KEY


def test_another_file_is_named_as_such() -> None:
    assert _refused(b"PK\x03\x04 something else entirely") is Reason.ARCHIVE_FOREIGN


def test_without_its_manifest_it_is_incomplete() -> None:
    """Well encrypted, but the writer never came to the end of the contents."""
    file = io.BytesIO()
    writer = sealed.SealedWriter(file, KEY)
    writer.write(bytes(10240))
    writer.finish()
    assert _refused(file.getvalue()) is Reason.ARCHIVE_DAMAGED
