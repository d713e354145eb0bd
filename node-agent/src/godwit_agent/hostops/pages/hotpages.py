"""Pages that a restore brings itself, among CRIU's own images, and not the page daemon later.

A process that has just been resumed touches first what it wrote last: a hundred pages or so, for
each of which it would wait for the daemon. They become part of the pages file that CRIU's restore
reads anyway (criu/mem.c, restore_priv_vma_content, v4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from godwit_agent.memory import pagemap
from godwit_agent.memory.pagemap import PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted
from godwit_api.reasons import Reason

# Numbers of pages files count from 1 (criu/image.c); ours begin where CRIU never comes.
_OURS = 1 << 30
# Each costs the freeze a few microseconds. Later it costs the process ten times that.
_MOST_PAGES = 1024
# What a process costs whatever it has: 2 ms.
_MOST_PROCESSES = 8
_MOST_BYTES = 8 << 20


def room(images: Path, number: int, before: int) -> int:
    """How many pages may be brought, to a process that comes after ``before`` others: none
    beside a large pages file, which would be copied."""
    small = _old(images, number).stat().st_size <= _MOST_BYTES
    return _MOST_PAGES if small and before < _MOST_PROCESSES else 0


def bring(
    images: Path,
    vpid: int,
    number: int,
    entries: tuple[Entry, ...],
    hot: list[Entry],
    read: Callable[[int, int], bytes],
) -> None:
    """Puts ``hot`` ones of ``entries``, the page map of ``vpid``, into a pages file beside the
    old one, ``number``; ``read(address, length)`` has their content. All or nothing: the page
    map names the one or the other file."""
    old = _old(images, number).read_bytes()
    held = sum(entry.pages * PAGE for entry in entries if entry.flags & PE_PRESENT)
    if len(old) != held:
        message = f"process {vpid}: {len(old)} bytes of pages where {held} are listed"
        raise Aborted(Reason.VERIFY_FAILED, message)
    mended = pagemap.present(entries, hot)
    pages = b"".join(_pages(entries, mended, memoryview(old), read))
    (images / f"pages-{_OURS + vpid}.img").write_bytes(pages)
    whole = images / f"pagemap-{vpid}.new"
    whole.write_bytes(pagemap.encode(_OURS + vpid, mended))
    whole.rename(images / f"pagemap-{vpid}.img")


def _old(images: Path, number: int) -> Path:
    return images / f"pages-{number}.img"


def _pages(
    entries: tuple[Entry, ...],
    mended: list[Entry],
    old: memoryview,
    read: Callable[[int, int], bytes],
) -> Iterator[memoryview | bytes]:
    at = 0
    for before, after in zip(entries, mended, strict=True):
        length = after.pages * PAGE
        if before.flags & PE_PRESENT:
            yield old[at : at + length]
            at += length
        elif after.flags & PE_PRESENT:
            yield read(after.vaddr, length)
