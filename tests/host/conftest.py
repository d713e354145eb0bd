"""What the tests with real CRIU share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.lab import Lab, lab

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def scene() -> Iterator[Lab]:
    """Two nodes and a client, new for each test."""
    scratch = Path(tempfile.mkdtemp(prefix="godwit-lab-", dir="/var/tmp"))
    with lab(scratch) as made:
        yield made
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def huge_pages(request: pytest.FixtureRequest) -> Iterator[str]:
    """To whom this machine gives huge pages (admin-guide/mm/transhuge.rst), while a test lasts;
    as it does anyway where the parameter is empty."""
    mode: str = request.param
    before = _HUGE_PAGES.read_text() if _HUGE_PAGES.exists() else ""
    if mode:
        if not os.access(_HUGE_PAGES, os.W_OK):
            pytest.skip("this machine's huge pages are not ours to set")
        _HUGE_PAGES.write_text(mode)
    yield mode
    if mode:
        _HUGE_PAGES.write_text(before[before.index("[") + 1 : before.index("]")])
