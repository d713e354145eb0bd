"""Which pages of shared memory are sent, against a plain model; what a store accepts of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit_agent.hostops import filerecords, pagedigest
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_agent.hostops.pagedigest import Table
from godwit_agent.hostops.pages import sharedmemory
from godwit_agent.hostops.pages.sharedmemory import SHARED, About
from godwit_agent.hostops.pages.sharedstore import SharedStore
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted, GodwitError, Rejected

PAGES = 24
_RUN = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda pair: (pair[0], min(PAGES, pair[0] + pair[1]))
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _RUN, st.integers(0, 3)),
        st.tuples(st.just("send"), _RUN, st.just(0)),
        st.tuples(st.just("empty"), _RUN, st.just(0)),
    ),
    max_size=30,
)


class Memory:
    """Pages of a process, and where they lie."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, PAGES * PAGE)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def write(self, page: int, value: int) -> None:
        self.map[page * PAGE : (page + 1) * PAGE] = bytes([value]) * PAGE


def numbers(runs: list[tuple[int, int]] | None) -> set[int]:
    assert runs is not None
    found: set[int] = set()
    for low, high in runs:
        assert low < high
        assert not found & set(range(low, high))
        found.update(range(low, high))
    return found


@settings(deadline=None)
@given(_STEPS)
def test_exactly_what_differs_from_what_was_sent_is_found(
    steps: list[tuple[str, tuple[int, int], int]],
) -> None:
    memory, table = Memory(), Table()
    now, sent = [0] * PAGES, dict[int, int]()
    for what, (low, high), value in steps:
        if what == "write":
            for page in range(low, high):
                memory.write(page, value)
                now[page] = value
        elif what == "send":
            table.sent(memory.at + low * PAGE, low, high - low)
            sent.update((page, now[page]) for page in range(low, high))
        else:
            assert numbers(table.emptied(low, high)) == sent.keys() & set(range(low, high))
            for page in range(low, high):
                sent.pop(page, None)
        differ = {page for page in range(PAGES) if sent.get(page) != now[page]}
        assert numbers(table.changed(memory.at, 0, PAGES)) == differ


@settings(deadline=None)
@given(st.integers(0, PAGE * 8 - 1))
def test_one_bit_makes_another_page(bit: int) -> None:
    memory, table = Memory(), Table()
    memory.map[:PAGE] = os.urandom(PAGE)
    table.sent(memory.at, 0, 1)
    assert table.changed(memory.at, 0, 1) == []
    memory.map[bit // 8] ^= 1 << bit % 8
    assert table.changed(memory.at, 0, 1) == [(0, 1)]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_two_words_that_change_places_make_another_page(one: int, other: int) -> None:
    memory, table = Memory(), Table()
    memory.map[:PAGE] = os.urandom(PAGE)
    table.sent(memory.at, 0, 1)
    first, second = memory.map[one * 8 : one * 8 + 8], memory.map[other * 8 : other * 8 + 8]
    memory.map[one * 8 : one * 8 + 8] = second
    memory.map[other * 8 : other * 8 + 8] = first
    assert bool(table.changed(memory.at, 0, 1)) == (one != other)


@settings(deadline=None)
@given(st.integers(1, 256 * PAGE), st.data())
def test_a_fingerprint_tells_any_change(length: int, data: st.DataObject) -> None:
    content = bytearray(os.urandom(length))
    before = pagedigest.fingerprint(bytes(content))
    assert pagedigest.fingerprint(bytes(content)) == before
    at = data.draw(st.integers(0, length - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    assert pagedigest.fingerprint(bytes(content)) != before


def test_pages_that_change_places_make_another_fingerprint() -> None:
    one, other = os.urandom(PAGE), os.urandom(PAGE)
    assert pagedigest.fingerprint(one + other) != pagedigest.fingerprint(other + one)
    assert pagedigest.fingerprint(one) != pagedigest.fingerprint(one + bytes(PAGE))


_SIZE = Table.PAGES * PAGE


@given(st.lists(st.tuples(st.integers(0, 4 * _SIZE), st.integers(1, 2 * _SIZE)), max_size=5))
def test_pieces_are_the_pages_of_the_ranges_table_by_table(pairs: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in pairs]
    pages = list(sharedmemory._pages(ranges))
    assert [(s // PAGE * PAGE, -(-e // PAGE) * PAGE) for s, e in ranges] == pages
    pieces = list(sharedmemory._pieces(pages))
    assert sum(end - start for _, start, end in pieces) == sum(end - start for start, end in pages)
    for number, start, end in pieces:
        assert number * _SIZE <= start < end <= (number + 1) * _SIZE


def test_memory_that_ends_is_no_page() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    libc = sharedmemory._libc
    address = libc.mmap(None, 3 * PAGE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    table, buffer = Table(), Memory()
    table.sent(buffer.at, 0, 3)
    assert table.changed(address, 0, 1) == []
    assert table.changed(address, 0, 3) is None
    assert pagedigest.copy(buffer.at, address, PAGE)
    assert not pagedigest.copy(buffer.at, address, 2 * PAGE)
    libc.munmap(address, 3 * PAGE)
    os.close(fd)


# the store

ABOUT = About(7, 1234, b"buffers", sealable=False, sysv=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SharedStore]:
    made = SharedStore(tmp_path)
    yield made
    made.close()


def announce(store: SharedStore, size: int, about: About = ABOUT, index: int = 1) -> None:
    header = filerecords.encode(Record(Kind.SHARED, "", b".", size=size, number=index))
    store.announce(filerecords.decode(header), memoryview(msgspec.msgpack.encode(about)))


def populated(store: SharedStore, *ranges: tuple[int, int]) -> None:
    body = b"".join(number.to_bytes(8, "little") for pair in ranges for number in pair)
    store.populated(SHARED | 1, 0, memoryview(body))


def test_a_complete_object_has_its_size(store: SharedStore) -> None:
    announce(store, 0)
    store.write(SHARED | 1, PAGE, memoryview(b"x" * PAGE))
    announce(store, PAGE + 10)
    populated(store, (PAGE, 2 * PAGE))
    assert store.complete_all() == PAGE
    assert os.fstat(store._objects[1].fd).st_size == PAGE + 10


def test_a_complete_object_is_changed_by_nobody(store: SharedStore) -> None:
    announce(store, PAGE)
    store.write(SHARED | 1, 0, memoryview(b"x" * PAGE))
    populated(store, (0, PAGE))
    store.complete_all()
    of_a_process = os.dup(store._objects[1].fd)
    for late in (
        lambda: store.write(SHARED | 1, 0, memoryview(b"y" * PAGE)),
        lambda: store.zero(SHARED | 1, 0, PAGE),
        lambda: announce(store, 0, msgspec.structs.replace(ABOUT, gone=True)),
        lambda: announce(store, 0, msgspec.structs.replace(ABOUT, copy=8)),
    ):
        with pytest.raises(Rejected, match="complete"):
            late()
    assert store.complete_all() == PAGE, "it may be asked for again"
    store.close()
    assert os.pread(of_a_process, 2 * PAGE, 0) == b"x" * PAGE
    os.close(of_a_process)


def test_what_an_earlier_copy_still_sends_is_refused(store: SharedStore) -> None:
    announce(store, PAGE)
    announce(store, PAGE, msgspec.structs.replace(ABOUT, copy=8), index=2)
    with pytest.raises(Rejected, match="not announced"):
        store.write(SHARED | 1, 0, memoryview(b"x" * PAGE))


@pytest.mark.parametrize(
    ("size", "ranges"),
    [
        (3 * PAGE, [(0, PAGE)]),  # has not come
        (PAGE, [(PAGE, 2 * PAGE)]),  # is not within it
        (3 * PAGE, [(PAGE, 3 * PAGE)]),
    ],
)
def test_an_incomplete_object_is_refused(
    store: SharedStore, size: int, ranges: list[tuple[int, int]]
) -> None:
    announce(store, size)
    store.write(SHARED | 1, PAGE, memoryview(b"x" * PAGE))
    populated(store, *ranges)
    with pytest.raises(Aborted):
        store.complete_all()


def test_an_object_without_a_list_is_refused(store: SharedStore) -> None:
    announce(store, PAGE)
    with pytest.raises(Aborted, match="nothing is known"):
        store.complete_all()


def test_two_objects_of_one_number_are_refused(store: SharedStore) -> None:
    for index in (1, 2):
        announce(store, 0, index=index)
        store.populated(SHARED | index, 0, memoryview(b""))
    with pytest.raises(Aborted, match="one number"):
        store.complete_all()


def test_pages_of_what_nobody_knows_are_refused(store: SharedStore) -> None:
    with pytest.raises(Rejected, match="not announced"):
        store.write(SHARED | 3, 0, memoryview(bytes(PAGE)))


@pytest.mark.parametrize(
    "about",
    [
        About(7, -1, b"", sealable=False, sysv=False),
        About(7, 1, b"x" * 250, sealable=False, sysv=False),
        About(7, 1, b"a\0b", sealable=False, sysv=False),
    ],
)
def test_an_object_of_a_wrong_form_is_refused(store: SharedStore, about: About) -> None:
    with pytest.raises(Rejected):
        announce(store, 0, about)


def test_an_object_does_not_become_another_one(store: SharedStore) -> None:
    announce(store, 0)
    with pytest.raises(Rejected, match="another"):
        announce(store, 0, msgspec.structs.replace(ABOUT, number=4321))


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 1 << 60), st.integers(0, 1 << 20))
def test_any_bytes_are_an_object_or_an_error(body: bytes, size: int, index: int) -> None:
    store = SharedStore(Path("/nowhere"))
    record = Record(Kind.SHARED, "", b".", size=size, number=index)
    try:
        store.announce(record, memoryview(body))
    except GodwitError:
        assert not store._objects
    finally:
        store.close()


def test_what_the_restore_has_not_taken_is_noticed(store: SharedStore, tmp_path: Path) -> None:
    announce(store, PAGE)
    populated(store)
    store.complete_all()
    store.require_given()  # CRIU has no page map of it: it was not there any more
    (tmp_path / "pagemap-shmem-1234.img").write_bytes(b"")
    with pytest.raises(Aborted, match="1234"):
        store.require_given()
