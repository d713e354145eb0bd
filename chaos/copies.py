"""Where the moved process runs, seen from outside: the machine's own process table.

All nodes of a testbed share one kernel, so one table has the copies on all of them. A copy runs
if it is neither stopped nor in a frozen cgroup.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

_PROC = Path("/proc")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_UNIFIED = Path("/sys/fs/cgroup")
_EVERY_S = 0.03
_PF_EXITING, _SIGKILL = 0x4, 1 << 8
_FEWEST = 10  # samples of the source before anything happens


def cgroup_of(text: str) -> tuple[str, str]:
    """(freezer, unified) path of a ``/proc/<pid>/cgroup``; empty where there is none."""
    freezer = unified = ""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "freezer":
            freezer = path
        elif number == "0":
            unified = path
    return freezer, unified


def node_of(path: str, testbed: str) -> str | None:
    """Node whose cgroup it is: ``/godwit-testbed-<name>/<node>/…``."""
    parts = path.strip("/").split("/")
    return parts[1] if len(parts) > 1 and parts[0] == f"godwit-testbed-{testbed}" else None


@dataclass
class Copies:
    """Watches processes named ``command`` while the block runs.

    ``doubles``: what was to be seen of each copy when two of them ran.
    """

    testbed: str
    command: str
    every_s: float = _EVERY_S
    seen: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    failure: str = ""
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Copies:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._over.wait(self.every_s):
                self.seen.append("+".join(sorted(self.running())))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def running(self) -> set[str]:
        """Nodes on which a copy runs at this moment."""
        copies = at_once(_PROC.glob("[0-9]*"), self._node)
        nodes = set(copies.values())
        if len(nodes) > 1:
            self.doubles += [f"{node}: {_told(process)}" for process, node in copies.items()]
        return nodes

    def _node(self, process: Path) -> str | None:
        """Node on which this process runs now, if it is a copy."""
        with contextlib.suppress(OSError, ValueError):
            if (process / "comm").read_text().strip() != self.command:
                return None
            freezer, unified = cgroup_of((process / "cgroup").read_text())
            node = node_of(freezer or unified, self.testbed)
            # in this order: what was thawed to be killed is dying when it is looked at then
            if (
                node
                and not _frozen(freezer, unified)
                and alive((process / "stat").read_text(), (process / "status").read_text())
            ):
                return node
        return None

    def blind(self, source: str) -> str:
        """Why its word is worth nothing: it has failed, or not even seen the source run."""
        if self.failure:
            return self.failure
        return "" if self.seen.count(source) >= _FEWEST else f"never saw it run on {source}"

    def history(self) -> list[str]:
        """Nodes in the order in which the process ran on them; ``a+b``: on both at a time."""
        return [where for where, _ in groupby(one for one in self.seen if one)]


def at_once(processes: Iterable[Path], node: Callable[[Path], str | None]) -> dict[Path, str]:
    """The processes that run, by ``node`` (where each runs when it is asked), all at one time.

    To go through the table takes longer than a freeze on a busy machine: what ran when the look
    began may be frozen, and have gone on elsewhere, when it ends. So where there seem to be two,
    each is looked at again; only who was running before and after the others did so at once.
    """
    found = {one: where for one in processes if (where := node(one))}
    if len(set(found.values())) > 1:
        found = {one: where for one in found if (where := node(one))}
    return found


def _told(process: Path) -> str:
    """State, cgroups and waiting place of a process in one line, as the kernel tells them."""
    with contextlib.suppress(OSError):
        stat, wchan = (process / "stat").read_text(), (process / "wchan").read_text()
        freezer, unified = cgroup_of((process / "cgroup").read_text())
        return f"{stat.strip()} at {wchan} in {freezer or unified}"
    return f"{process.name} has gone"


def alive(stat: str, status: str) -> bool:
    """Whether a process of ``/proc/<pid>/stat`` and ``status`` may run its own code: it is neither
    stopped nor ended, does not end (PF_EXITING, linux/sched.h) and has not been killed."""
    words = stat.rpartition(")")[2].split()
    killed = any(
        int(line.split()[1], 16) & _SIGKILL
        for line in status.splitlines()
        if line.startswith(("SigPnd:", "ShdPnd:"))
    )
    return words[0] not in "TtZX" and not int(words[6]) & _PF_EXITING and not killed


def _frozen(freezer: str, unified: str) -> bool:
    """Raises ``OSError`` when the cgroup has gone, and with it its processes."""
    if freezer:
        return (_FREEZER / freezer.strip("/") / "freezer.state").read_text().strip() != "THAWED"
    return "frozen 1" in (_UNIFIED / unified.strip("/") / "cgroup.events").read_text()
