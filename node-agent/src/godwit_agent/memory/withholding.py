"""Which written pages a freeze still sends, when it may not send all of them. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from godwit_agent.memory.pageset import PAGE

Ranges = list[tuple[int, int]]


def split(
    ranges: Ranges, areas: Iterable[tuple[int, int]], allowance: int
) -> tuple[Ranges, Ranges]:
    """(sent, withheld): at most ``allowance`` bytes are sent.

    ``ranges`` are sorted and lie in ``areas``, the process's mappings. Small mappings are sent
    first: stacks, globals and thread-local data are what every process touches at once.
    """
    if sum(end - start for start, end in ranges) <= allowance:
        return ranges, []
    starts = [start for start, _ in ranges]
    left = max(allowance, 0) // PAGE * PAGE
    sent: Ranges = []
    withheld: Ranges = []
    for low, high in sorted(areas, key=_size):
        # the range before the first that begins in the area may reach into it
        mine = ranges[max(bisect_left(starts, low) - 1, 0) : bisect_left(starts, high)]
        if mine and mine[0][1] <= low:
            mine = mine[1:]
        if not mine:
            continue
        mine[0] = max(mine[0][0], low), mine[0][1]
        mine[-1] = mine[-1][0], min(mine[-1][1], high)
        at = 0
        while at < len(mine) and left:
            start, end = mine[at]
            cut = min(end, start + left)
            sent.append((start, cut))
            left -= cut - start
            if cut < end:
                mine[at] = cut, end
            else:
                at += 1
        withheld += mine[at:]
    return sent, withheld


def _size(area: tuple[int, int]) -> int:
    return area[1] - area[0]
