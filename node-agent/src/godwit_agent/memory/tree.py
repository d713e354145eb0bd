"""The process tree as CRIU writes it, and the two images its page daemon starts with.

``pstree.img`` (images/pstree.proto): pid, ppid, pgid, sid, threads of each
process, parents first. ``inventory.img`` (images/inventory.proto): the daemon
checks ``img_version`` and ``fdinfo_per_id`` only (criu/image.c, v4.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from godwit_agent.memory import protobuf
from godwit_agent.memory.pagemap import IMG_COMMON_MAGIC
from godwit_agent.memory.protobuf import ImageError

PSTREE_MAGIC = 0x50273030
INVENTORY_MAGIC = 0x58313116
_IMAGE_VERSION = 2


@dataclass(frozen=True, slots=True)
class Process:
    """Numbers inside the container's PID namespace; ``ppid`` 0 for its first process."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]


def encode(processes: Iterable[Process]) -> bytes:
    return protobuf.image(
        (IMG_COMMON_MAGIC, PSTREE_MAGIC),
        (
            protobuf.message(
                [(1, item.pid), (2, item.ppid), (3, item.pgid), (4, item.sid)]
                + [(5, thread) for thread in item.threads]
            )
            for item in processes
        ),
    )


def decode(data: bytes) -> tuple[Process, ...]:
    """Raises ``ImageError``."""
    return tuple(
        _process(entry) for entry in protobuf.entries(data, (IMG_COMMON_MAGIC, PSTREE_MAGIC))
    )


def inventory() -> bytes:
    """The least inventory that the page daemon accepts."""
    return protobuf.image((INVENTORY_MAGIC,), [protobuf.message([(1, _IMAGE_VERSION), (2, 1)])])


def _process(entry: memoryview) -> Process:
    single: dict[int, int] = {}
    threads: list[int] = []
    for number, value in protobuf.fields(entry):
        if number == 5:
            threads.append(value)
        else:
            single[number] = value
    if not {1, 2, 3, 4} <= single.keys():
        raise ImageError("incomplete process")
    return Process(single[1], single[2], single[3], single[4], tuple(threads))
