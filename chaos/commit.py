"""What was run."""

from __future__ import annotations

import subprocess

from lab.cluster import ROOT


def commit() -> str:
    """Of this checkout; ends in ``-dirty`` when more than results has changed."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!chaos/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
