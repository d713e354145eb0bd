"""A set of page numbers, made for ranges: adding and checking run at C speed.

One byte per page in chunks of 1 GiB of address space; only chunks that hold a
page exist. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

PAGE = 4096
_CHUNK_PAGES = 1 << 18
_ONES = memoryview(b"\x01" * _CHUNK_PAGES)


class PageSet:
    """Pages of one address space; all arguments are addresses, multiples of ``PAGE``."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def add(self, start: int, end: int) -> None:
        for number, first, last in _pieces(start, end):
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = bytearray(_CHUNK_PAGES)
            chunk[first:last] = _ONES[: last - first]

    def add_all(self, numbers: Sequence[int]) -> None:
        """Many ranges: start, end, start, end …"""
        chunks, bits = self._chunks, _CHUNK_PAGES.bit_length() - 1
        pairs = iter(numbers)
        for start, end in zip(pairs, pairs, strict=True):
            first, last = start // PAGE, end // PAGE
            number = first >> bits
            chunk = chunks.get(number)
            if chunk is None or last > (number + 1) << bits:
                self.add(start, end)
                continue
            first -= number << bits
            last -= number << bits
            if last - first == 1:
                chunk[first] = 1
            else:
                chunk[first:last] = _ONES[: last - first]

    def unite(self, other: PageSet) -> None:
        """Adds all pages of ``other``."""
        for number, chunk in other._chunks.items():
            mine = self._chunks.get(number)
            if mine is None:
                self._chunks[number] = bytearray(chunk)
            else:
                both = int.from_bytes(mine, "little") | int.from_bytes(chunk, "little")
                mine[:] = both.to_bytes(_CHUNK_PAGES, "little")

    def within(self, ranges: Iterable[tuple[int, int]]) -> PageSet:
        """Those pages that lie in ``ranges``."""
        found = PageSet()
        for start, end in ranges if self._chunks else ():
            for number, first, last in _pieces(start, end):
                chunk = self._chunks.get(number)
                if chunk is None or chunk.find(1, first, last) < 0:
                    continue
                into = found._chunks.setdefault(number, bytearray(_CHUNK_PAGES))
                into[first:last] = memoryview(chunk)[first:last]
        return found

    def marks(self) -> Iterator[tuple[int, bytearray]]:
        """(number of the first page, one byte for each page from there on: 1 for those in the
        set), in order; what lies between has none."""
        for number in sorted(self._chunks):
            yield number * _CHUNK_PAGES, self._chunks[number]

    def covers(self, start: int, end: int) -> bool:
        return self.first_missing(start, end) is None

    def first_missing(self, start: int, end: int) -> int | None:
        """Lowest address in the range whose page is not in the set."""
        for number, first, last in _pieces(start, end):
            chunk = self._chunks.get(number)
            index = first if chunk is None else chunk.find(0, first, last)
            if index >= 0:
                return (number * _CHUNK_PAGES + index) * PAGE
        return None

    def touches(self, start: int, end: int) -> bool:
        """Whether any page of the range is in the set."""
        for number, first, last in _pieces(start, end):
            chunk = self._chunks.get(number)
            if chunk is not None and chunk.find(1, first, last) >= 0:
                return True
        return False

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of the range that are in the set, in order; cut at borders of chunks."""
        for number, first, last in _pieces(start, end):
            chunk = self._chunks.get(number)
            begin = -1 if chunk is None else chunk.find(1, first, last)
            while chunk is not None and begin >= 0:
                stop = chunk.find(0, begin, last)
                stop = last if stop < 0 else stop
                base = number * _CHUNK_PAGES
                yield (base + begin) * PAGE, (base + stop) * PAGE
                begin = chunk.find(1, stop, last)

    def __len__(self) -> int:
        return sum(chunk.count(1) for chunk in self._chunks.values())


def _pieces(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    page, stop = start // PAGE, end // PAGE
    while page < stop:
        number, first = divmod(page, _CHUNK_PAGES)
        last = min(_CHUNK_PAGES, first + stop - page)
        yield number, first, last
        page += last - first
