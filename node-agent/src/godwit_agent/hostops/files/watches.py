"""What the processes of a container watch by inotify, by name.

An image of CRIU names a watched file by its handle, which means nothing on
another node, or by its path. CRIU finds paths itself only where it can open the
handle, which overlays refuse (criu/fsnotify.c, check_open_handle); elsewhere it
searches what it is told to (irmap-scan-path). So the search is done here,
before the freeze.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from godwit_agent.hostops import procs

# proc_pid_fdinfo(5); the device number is the kernel's own encoding: 20 bits of minor
_WATCH = re.compile(r"^inotify wd:\S+ ino:([0-9a-f]+) sdev:([0-9a-f]+)", re.MULTILINE)
_PSEUDO = ("proc", "sys")


@dataclass(frozen=True, slots=True)
class Watched:
    """``paths`` as the container sees them, deepest first; ``lost`` have no name any more."""

    paths: tuple[str, ...]
    lost: int


def find(init_pid: int, pids: Iterable[int]) -> Watched:
    """Searches the container's tree when something is watched."""
    wanted = {key for pid in pids for key in _watches(pid)}
    root = f"/proc/{init_pid}/root/."
    found: dict[tuple[int, int], str] = {}
    if wanted:
        with contextlib.suppress(OSError):
            _note(Path(root).stat(), "/", wanted, found)
        _search(root, wanted, found)
    paths = sorted(found.values(), key=lambda path: path.count("/"), reverse=True)
    return Watched(tuple(paths), len(wanted) - len(found))


def _watches(pid: int) -> Iterable[tuple[int, int]]:
    for number, target in procs.descriptors(pid):
        if target in ("anon_inode:inotify", "anon_inode:[inotify]"):
            for inode, device in _WATCH.findall(procs.read(pid, f"fdinfo/{number}")):
                encoded = int(device, 16)
                yield os.makedev(encoded >> 20, encoded & 0xFFFFF), int(inode, 16)


def _search(root: str, wanted: set[tuple[int, int]], found: dict[tuple[int, int], str]) -> None:
    for top, directories, files, fd in os.fwalk(root, follow_symlinks=False):
        if top == root:
            directories[:] = [name for name in directories if name not in _PSEUDO]
        for name in (*directories, *files):
            if len(found) == len(wanted):
                return
            with contextlib.suppress(OSError):
                about = os.stat(name, dir_fd=fd, follow_symlinks=False)
                _note(about, f"{top.removeprefix(root)}/{name}", wanted, found)


def _note(
    about: os.stat_result,
    path: str,
    wanted: set[tuple[int, int]],
    found: dict[tuple[int, int], str],
) -> None:
    key = about.st_dev, about.st_ino
    if key in wanted:
        found.setdefault(key, path)
