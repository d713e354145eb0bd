"""Reading ``/proc`` of processes that may end at any moment. Nothing here raises for that."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from godwit_agent.memory.tree import Process

_PROC = Path("/proc")
_PTS_MAJOR = 136  # UNIX98_PTY_SLAVE_MAJOR, linux/major.h
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of ``/proc/<pid>/maps``."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str

    @property
    def private_anonymous(self) -> bool:
        """What CRIU may load lazily (``vma_entry_can_be_lazy``, criu/include/vma.h)."""
        if self.permissions[3] != "p" or self.inode:
            return False
        name = self.name
        return name in ("", "[heap]", "[stack]") or name.startswith("[anon")


def unescape(text: str) -> str:
    r"""``\040`` and the like of mountinfo, proc_pid_mountinfo(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read(pid: int, name: str) -> str:
    try:
        # no text mode: it would take a "\r" in a name for the end of a line
        return (_PROC / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def lines(pid: int, name: str) -> list[str]:
    """What the kernel calls a line: it escapes "\n" in names, and nothing else that
    ``str.splitlines`` splits at."""
    return [line for line in read(pid, name).split("\n") if line]


def status(pid: int, task: int | None = None) -> dict[str, str]:
    """Fields of ``status``; empty when the process has gone."""
    name = "status" if task is None else f"task/{task}/status"
    pairs = (line.partition(":") for line in lines(pid, name))
    return {key: value.strip() for key, _, value in pairs}


def threads(pid: int) -> tuple[int, ...]:
    """The first one is the process itself: numbers begin anew at the end of their range
    (kernel.pid_max), so that its threads may have lower ones."""
    try:
        found = [int(path.name) for path in (_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return ()
    return tuple(sorted(found, key=lambda task: (task != pid, task)))


def states(pid: int) -> set[str]:
    """State letters of all threads (proc_pid_stat(5)); empty when the process has gone."""
    found = set()
    for task in threads(pid):
        text = read(pid, f"task/{task}/stat")
        if text:
            found.add(text.rpartition(")")[2].split()[0])
    return found


def ends(pid: int) -> bool:
    """Whether a process has ended, or will without an instruction more: SIGKILL is pending
    (proc_pid_status(5)), as for one that was killed while it was frozen."""
    fields = dict(line.partition(":\t")[::2] for line in lines(pid, "status"))
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    killed = bool(pending >> (signal.SIGKILL - 1) & 1)
    return killed or fields.get("State", "X")[:1] in ("X", "Z")


def tree(init_pid: int) -> tuple[int, ...]:
    """Host pids of ``init_pid`` and all its descendants, parents first."""
    found: list[int] = []
    pending = [init_pid]
    while pending:
        pid = pending.pop(0)
        tasks = threads(pid)
        if not tasks:
            continue
        found.append(pid)
        for task in tasks:
            pending.extend(int(child) for child in read(pid, f"task/{task}/children").split())
    return tuple(dict.fromkeys(found))


def security_labels(pid: int) -> set[str]:
    """What the node's security module calls each thread (proc_pid_attr(5))."""
    found = {read(pid, f"task/{task}/attr/current").strip("\0\n") for task in threads(pid)}
    return found - {""}


def vpid(pid: int) -> int | None:
    """Number of the process in its own PID namespace."""
    numbers = status(pid).get("NSpid", "").split()
    return int(numbers[-1]) if numbers else None


def start_time(pid: int) -> int | None:
    """Clock ticks after boot: with the pid, names a process for good."""
    text = read(pid, "stat")
    return int(text.rpartition(")")[2].split()[19]) if text else None


def namespace(pid: int, kind: str) -> str:
    """Names a namespace of a process; empty when it has gone."""
    try:
        return str((_PROC / str(pid) / "ns" / kind).readlink())
    except OSError:
        return ""


def everyone() -> Iterator[int]:
    """All processes of this machine, as far as our own PID namespace shows them."""
    for path in _PROC.iterdir():
        if path.name.isdigit():
            yield int(path.name)


def is_zombie(pid: int) -> bool:
    return read(pid, "stat").rpartition(")")[2][:3].strip() == "Z"


def processes(init_pid: int) -> tuple[Process, ...]:
    """The tree as the container itself numbers it, parents first. What ends while it is looked at
    is left out: of a process that is being reaped the kernel says that it has no parent
    (fs/proc/array.c, task_state), and CRIU takes no tree with two roots."""
    pids = tree(init_pid)
    numbers = {pid: number for pid in pids if (number := vpid(pid))}
    found: dict[int, Process] = {}
    for pid in numbers:
        one = _process(pid, numbers)
        if one.threads and (pid == init_pid or one.ppid in found):
            found[one.pid] = one
    return tuple(found.values())


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """(number, what it points to) of all open files."""
    directory = _PROC / str(pid) / "fd"
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            yield int(name), str((directory / name).readlink())


def stat(pid: int, number: int) -> os.stat_result | None:
    """Of an open file."""
    try:
        return (_PROC / str(pid) / "fd" / str(number)).stat()
    except OSError:
        return None


def message_queues(pid: int) -> set[int]:
    """Device numbers of the mqueue file systems that the process sees."""
    found = set()
    for line in lines(pid, "mountinfo"):
        if " - mqueue " in line:
            major, _, minor = line.split()[2].partition(":")
            found.add(os.makedev(int(major), int(minor)))
    return found


def terminal(pid: int) -> int | None:
    """Index of the pseudo-terminal that controls the process (tty_nr of proc_pid_stat(5))."""
    text = read(pid, "stat").rpartition(")")[2].split()
    number = int(text[4]) if len(text) > 4 else 0
    major = number >> 8 & 0xFFF
    if not _PTS_MAJOR <= major < _PTS_MAJOR + 8:
        return None
    return (major - _PTS_MAJOR << 8) + (number & 0xFF | number >> 12 & 0xFFF00)


def terminals_made(pid: int) -> Iterator[int]:
    """Indexes of the pseudo-terminals whose master side the process has open."""
    for number, target in descriptors(pid):
        if target.endswith("/ptmx"):
            for line in lines(pid, f"fdinfo/{number}"):
                if line.startswith("tty-index:"):
                    yield int(line.split()[1])


def mappings(pid: int) -> Iterator[Mapping]:
    for line in lines(pid, "maps"):
        parts = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in parts[0].split("-"))
        name = parts[5] if len(parts) > 5 else ""
        yield Mapping(start, end, parts[1], int(parts[4]), name)


def locked(pid: int) -> list[tuple[int, int]]:
    """Ranges of locked memory (mlock); costs a walk of all memory where there is any."""
    if status(pid).get("VmLck", "0 kB") == "0 kB":
        return []
    found: list[tuple[int, int]] = []
    area = (0, 0)
    for line in lines(pid, "smaps"):
        head = _AREA.match(line)
        if head:
            area = int(head[1], 16), int(head[2], 16)
        elif line.startswith("VmFlags:") and " lo " in f"{line} ":
            found.append(area)
    return found


def _process(pid: int, numbers: dict[int, int]) -> Process:
    fields = status(pid)

    def inner(name: str) -> int:
        words = fields.get(name, "").split()
        return int(words[-1]) if words else 0

    parent = numbers.get(int(fields.get("PPid") or 0), 0)
    ids = (status(pid, task).get("NSpid", "").split() for task in threads(pid))
    tasks = tuple(int(words[-1]) for words in ids if words)
    return Process(numbers[pid], parent, inner("NSpgid"), inner("NSsid"), tasks)
