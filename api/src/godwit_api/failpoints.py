"""Named places where a test makes a process fail; without the test setting they do nothing.

``enable`` is called once at start with the value of ``GODWIT_FAILPOINTS``: a
directory. A file in it that is named like a failpoint holds the action:

=================  ==========================================================
``crash``          SIGKILL to this process: nothing is flushed or cleaned up
``error``          ``OSError``, as from a failed system call
``delay 1.5``      seconds
``pause``          until the file ``<name>.go`` exists
=================  ==========================================================

A file acts once: it is renamed to ``<name>.hit`` before its action, so that a
restarted process comes through and a test sees that the place was reached. A
file that does not fit is told on stderr and left where it is.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
import time
from pathlib import Path

_ACTION = re.compile(r"crash|error|pause|delay \d{1,3}(\.\d{1,3})?")
_STEP_S = 0.02
_directory: Path | None = None


class FailpointError(Exception):
    """The directory cannot be used."""


def enable(directory: str) -> None:
    """Takes effect for this process; makes the directory. An empty name disables.

    Raises ``FailpointError`` for a directory that others could write to.
    """
    global _directory
    _directory = None
    if not directory:
        return
    path = Path(directory)
    if not path.is_absolute():
        raise FailpointError(f"failpoints: {path} is no absolute path")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise FailpointError(f"failpoints: {error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise FailpointError(f"failpoints: {path} is no directory")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise FailpointError(f"failpoints: others may write to {path}")
    _directory = path


def enabled() -> bool:
    """Whether this process obeys failpoints at all."""
    return _directory is not None


def reach(name: str, *, can_fail: bool = True) -> None:
    """Carries out what a test has asked for at ``name``, once.

    ``can_fail`` is false where no error is possible, such as behind a record
    that is on disk already: ``error`` does not fit there.
    """
    if _directory is None:
        return
    asked, hit = _directory / name, _directory / f"{name}.hit"
    try:
        action = asked.read_text().strip()
        if not _ACTION.fullmatch(action) or (action == "error" and not can_fail):
            print(f"failpoint {name}: {action!r} does not fit", file=sys.stderr)
            return
        asked.rename(hit)  # of several threads one gets it
    except FileNotFoundError:
        return
    word, _, argument = action.partition(" ")
    match word:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "error":
            raise OSError(f"failpoint {name}")
        case "delay":
            time.sleep(float(argument))
        case _:
            while not (_directory / f"{name}.go").exists():
                time.sleep(_STEP_S)
