"""What the tests with real CRIU share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.lab import Lab, lab


@pytest.fixture
def scene() -> Iterator[Lab]:
    """Two nodes and a client, new for each test."""
    scratch = Path(tempfile.mkdtemp(prefix="godwit-lab-", dir="/var/tmp"))
    with lab(scratch) as made:
        yield made
    shutil.rmtree(scratch, ignore_errors=True)
