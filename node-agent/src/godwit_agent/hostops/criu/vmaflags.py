"""Flags of a process's mappings, read while it still runs (node-agent/native/criu-vmas.c).

``/proc/<pid>/smaps`` is the only place that tells them, and reading it costs the kernel a look
at every page: 11 ms per GiB that the freeze need not pay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from godwit_agent.hostops import procs

_LINES = re.compile(r"^(?:[0-9a-f]+-[0-9a-f]+ |VmFlags: ).*\n", re.MULTILINE)
_LOCKED = re.compile(r"^VmLck:.*\n", re.MULTILINE)


def keep(directory: Path, pids: Iterable[int]) -> None:
    """A file per process; of one that ends meanwhile there is none, or half of one."""
    for pid in pids:
        locked = _LOCKED.search(procs.read(pid, "status"))
        lines = _LINES.findall(procs.read(pid, "smaps"))
        if locked and lines:
            (directory / str(pid)).write_text(locked[0] + "".join(lines))
