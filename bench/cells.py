"""What is measured: one cell is a workload, its memory, how much it writes, and the link. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

MEBIBYTE = 1 << 20
# A freeze that nobody would want; what cannot be done within it is refused, before the freeze.
HOPELESS_BUDGET_MS = 1000


@dataclass(frozen=True, slots=True)
class Cell:
    """``workload``: redis, dirtier (private memory) or shared (a memfd).

    ``dirty_rate``: MiB/s of pages written, each once (dirtier and shared). ``link_mbit``:
    Mbit/s between the nodes, 0 for what the machine gives. ``interval_ms``: of the client's
    requests, 0 for one after the other. ``limit``: of the copy, as ``spec.bandwidthLimit``.
    ``post_copy``: asked for, instead of a budget.
    """

    workload: str
    megabytes: int
    dirty_rate: int = 0
    link_mbit: int = 0
    moves: int = 3
    interval_ms: float = 1.0
    limit: str = ""
    post_copy: bool = False

    @property
    def name(self) -> str:
        """Unique within a grid, for ``--only`` and the tables."""
        parts = [self.workload, f"{self.megabytes}M"]
        if self.dirty_rate:
            parts.append(f"{self.dirty_rate}MBs")
        if self.link_mbit:
            parts.append(f"{self.link_mbit}mbit")
        if not self.interval_ms:
            parts.append("busy" if self.limit else "busy-unlimited")
        if self.post_copy:
            parts.append("postcopy")
        return "-".join(parts)

    @property
    def budget_ms(self) -> int:
        """Freeze budget of the migration; 0, none, for a load that the link can keep up with."""
        keeps_up = not self.link_mbit or self.dirty_rate * MEBIBYTE * 8 < self.link_mbit * 1e6
        return 0 if keeps_up or self.post_copy else HOPELESS_BUDGET_MS

    def to_json(self) -> dict[str, Any]:
        """The columns of a result."""
        return {"cell": self.name, **asdict(self)}


MAIN = Cell("redis", 512, moves=10)
SMALL = Cell("redis", 64, moves=10)
LARGE = Cell("redis", 4096, moves=10)
DEMO = Cell("redis", 200, moves=10)
BUSY = Cell("redis", 2048, link_mbit=1000, interval_ms=0, moves=6, limit="100M")
BUSY_UNLIMITED = replace(BUSY, limit="")
SHARED = Cell("shared", 512, dirty_rate=10, moves=3)
# Its total time is one of the figures, and scatters: the API server looks for admission rules once
# a second.
IDLE = Cell("dirtier", 2048, 0, 1000, moves=6)
# What is refused without it.
POST_COPY = (
    Cell("dirtier", 512, 200, 1000, post_copy=True),
    Cell("dirtier", 2048, 200, 1000, post_copy=True),
)
MEMORY = (64, 512, 2048, 4096)
DIRTY_RATES = (0, 10, 50, 200)
LINKS = (0, 1000)


def full() -> tuple[Cell, ...]:
    """Everything of docs/performance.md."""
    grid = tuple(
        Cell("dirtier", megabytes, rate, link)
        for megabytes in MEMORY
        for rate in DIRTY_RATES
        for link in LINKS
    )
    named = (MAIN, SMALL, LARGE, DEMO, BUSY, BUSY_UNLIMITED, SHARED)
    return (*named, *(_few(cell) for cell in grid), *POST_COPY)


def quick() -> tuple[Cell, ...]:
    """A few minutes: the main line, and whether pages are right under load."""
    return (
        replace(MAIN, moves=4),
        replace(SMALL, moves=4),
        Cell("dirtier", 512, 0, 0, 2),
        Cell("dirtier", 512, 50, 0, 2),
        Cell("dirtier", 512, 50, 1000, 2),
    )


def _few(cell: Cell) -> Cell:
    """As often as its figure asks for. A refusal is no timing: one is enough."""
    if cell.budget_ms:
        return replace(cell, moves=1)
    return IDLE if cell.name == IDLE.name else cell
