"""What was run."""

from __future__ import annotations

import subprocess

from lab.cluster import ROOT


def commit() -> str:
    """Of this checkout; ends in ``-dirty`` when it has changes."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
