"""The pages file that a restore reads, with pages from the store among CRIU's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit_agent.hostops.pages import hotpages
from godwit_agent.memory import pagemap
from godwit_agent.memory.pagemap import PE_LAZY, PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted

ENTRIES = (
    Entry(1 * PAGE, 1, PE_LAZY),
    Entry(4 * PAGE, 2, PE_PRESENT),
    Entry(8 * PAGE, 1, PE_LAZY),
    Entry(9 * PAGE, 1, PE_PRESENT),
)
HOT = [ENTRIES[2]]


def page(text: bytes) -> bytes:
    return text * PAGE


def images(directory: Path, own: bytes) -> None:
    (directory / "pagemap-7.img").write_bytes(pagemap.encode(3, ENTRIES))
    (directory / "pages-3.img").write_bytes(own)


def test_pages_lie_in_the_order_of_the_map(tmp_path: Path) -> None:
    images(tmp_path, page(b"a") + page(b"b") + page(b"c"))
    asked: list[tuple[int, int]] = []

    def read(start: int, length: int) -> bytes:
        asked.append((start, length))
        return page(b"h")

    hotpages.bring(tmp_path, 7, 3, ENTRIES, HOT, read)
    number, entries = pagemap.decode((tmp_path / "pagemap-7.img").read_bytes())
    assert [e.flags for e in entries] == [PE_LAZY, PE_PRESENT, PE_PRESENT, PE_PRESENT]
    assert number != 3
    pages = (tmp_path / f"pages-{number}.img").read_bytes()
    assert pages == page(b"a") + page(b"b") + page(b"h") + page(b"c")
    assert asked == [(8 * PAGE, PAGE)]


def test_a_pages_file_of_another_length_ends_the_restore(tmp_path: Path) -> None:
    images(tmp_path, page(b"a"))
    with pytest.raises(Aborted, match="process 7"):
        hotpages.bring(tmp_path, 7, 3, ENTRIES, HOT, lambda *_: page(b"h"))
    assert pagemap.decode((tmp_path / "pagemap-7.img").read_bytes()) == (3, ENTRIES)


def test_a_large_pages_file_and_the_many_are_left_alone(tmp_path: Path) -> None:
    images(tmp_path, page(b"a"))
    assert hotpages.room(tmp_path, 3, 0) > 0
    assert hotpages.room(tmp_path, 3, 100) == 0
    with (tmp_path / "pages-3.img").open("r+b") as file:
        file.truncate(64 << 20)
    assert hotpages.room(tmp_path, 3, 0) == 0
