"""Marks of missing pages: in a file, as the page daemon reads them and a later agent finds them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.hostops.pages.marks import ContainerMarks, Marks
from godwit_agent.memory.pageset import PAGE, PageSet

_FIRST = 0x7F0000000000 // PAGE  # where mappings are
_RUNS = st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 40)), max_size=8)


def filled(runs: list[tuple[int, int]]) -> tuple[PageSet, set[int]]:
    pages, model = PageSet(), set[int]()
    for start, count in runs:
        pages.add((_FIRST + start) * PAGE, (_FIRST + start + count) * PAGE)
        model.update(range(_FIRST + start, _FIRST + start + count))
    return pages, model


def members(marks: Marks, start: int = 0, end: int = 1 << 63) -> list[int]:
    return [at for a, b in marks.ranges(start, end) for at in range(a // PAGE, b // PAGE)]


@given(_RUNS, _RUNS, st.integers(0, 6000), st.integers(1, 3000))
def test_what_is_cleared_is_not_missing(
    tmp_path_factory: object, runs: list[tuple[int, int]], gone: list[tuple[int, int]],
    start: int, count: int,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("marks") / "missing-1"  # type: ignore[attr-defined]
    marks = Marks(path, create=True)
    pages, model = filled(runs)
    marks.set(pages)
    for first, length in gone:
        marks.clear((_FIRST + first) * PAGE, (_FIRST + first + length) * PAGE)
        model -= set(range(_FIRST + first, _FIRST + first + length))
    low, high = _FIRST + start, _FIRST + start + count
    for one in (marks, Marks(path)):  # and after a restart
        assert members(one) == sorted(model)
        assert one.bytes == len(model) * PAGE
        assert members(one, low * PAGE, high * PAGE) == sorted(model & set(range(low, high)))
        one.close()


def test_the_daemon_asks_and_hears(tmp_path: Path) -> None:
    missing = ContainerMarks(tmp_path)
    assert not missing
    pages, _ = filled([(0, 2)])
    missing.add(7, pages)
    wanted, arrived = (
        os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK) for name in ("wanted", "arrived")
    )
    first = _FIRST * PAGE
    for address in (first, first + PAGE, first):
        os.write(wanted, struct.pack("=QQ", 7, address))
    missing.close()  # what was asked outlives the agent
    again = ContainerMarks(tmp_path)
    assert again.processes() == (7,)
    assert again.bytes == 2 * PAGE
    assert again.asked() == [(7, first), (7, first + PAGE)]
    assert again.asked() == []
    for _ in range(1 << 17):  # more than a pipe holds
        again.ring()
    assert os.read(arrived, 1)
    again.close()
    os.close(wanted)
    os.close(arrived)
