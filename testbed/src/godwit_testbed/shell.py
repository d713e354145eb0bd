"""Running commands, and saying what is going on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from godwit_testbed.paths import TestbedError

_STARTED = time.monotonic()


def say(message: str) -> None:
    """One line of progress on standard error, with the seconds since the start."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f} s] {message}\n")
    sys.stderr.flush()


def run(
    *argv: str | Path,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    stdin_file: Path | None = None,
) -> str:
    """Run a command and return its standard output; a failure shows what it said."""
    words = [str(word) for word in argv]
    with open(stdin_file or os.devnull, "rb") as source:
        done = subprocess.run(
            words,
            input=stdin.encode() if stdin is not None else None,
            stdin=None if stdin is not None else source,
            capture_output=True,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            check=False,
        )
    if check and done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()[-2000:]
        raise TestbedError(f"`{' '.join(words)[:300]}` failed ({done.returncode}): {said}")
    return done.stdout.decode(errors="replace")


def logged(
    log: Path,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a long command into a log file; a failure shows the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            check=False,
        )
    if done.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise TestbedError(f"`{argv[0]} …` failed ({done.returncode}); end of {log}:\n{tail}")
