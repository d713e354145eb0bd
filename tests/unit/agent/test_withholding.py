"""What a freeze sends and what it withholds is together what was written, and not too much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.memory.pageset import PAGE
from godwit_agent.memory.withholding import split

_CUTS = st.sets(st.integers(0, 200), min_size=2, max_size=40).map(sorted)


def pages(ranges: list[tuple[int, int]]) -> list[int]:
    return [at for start, end in ranges for at in range(start // PAGE, end // PAGE)]


@given(_CUTS, _CUTS, st.integers(-1, 220 * PAGE))
def test_nothing_is_forgotten_and_nothing_twice(
    borders: list[int], written: list[int], allowance: int
) -> None:
    areas = [(a * PAGE, b * PAGE) for a, b in zip(borders[::2], borders[1::2], strict=False)]
    inside = set(pages(areas))
    ranges: list[tuple[int, int]] = []
    for low, high in zip(written[::2], written[1::2], strict=False):
        for at in range(low, high):
            if at in inside and ranges and ranges[-1][1] == at * PAGE:
                ranges[-1] = (ranges[-1][0], (at + 1) * PAGE)
            elif at in inside:
                ranges.append((at * PAGE, (at + 1) * PAGE))
    sent, withheld = split(ranges, areas, allowance)
    assert sorted(pages(sent) + pages(withheld)) == pages(ranges)
    assert len(pages(sent)) == min(max(allowance // PAGE, 0), len(pages(ranges)))


def test_small_mappings_are_sent_first() -> None:
    big, stack, small = (0, 100 * PAGE), (100 * PAGE, 104 * PAGE), (200 * PAGE, 203 * PAGE)
    # one written range reaches from the big mapping into its neighbour
    ranges = [(50 * PAGE, 102 * PAGE), (200 * PAGE, 203 * PAGE)]
    sent, withheld = split(ranges, [big, stack, small], 6 * PAGE)
    assert sent == [(200 * PAGE, 203 * PAGE), (100 * PAGE, 102 * PAGE), (50 * PAGE, 51 * PAGE)]
    assert withheld == [(51 * PAGE, 100 * PAGE)]
