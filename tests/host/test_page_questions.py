"""CRIU asks the kernel about pages through criu-shim.c, which must not answer for the kernel."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from godwit_agent.hostops.pages.pagescan import Scanner
from host.lab import build_shim

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
    pytest.mark.skipif(not Scanner().able, reason="the kernel has no PAGEMAP_SCAN"),
]
# As criu/kerndat.c, check_pagemap (v4.2): what is there of nothing, told with one category more.
_QUESTION = """
import fcntl, struct, sys
absent, there = 1 << 5 | 1 << 2, 1 << 3 | 1 << 4
question = struct.pack("<12Q", 96, 0, 0, 0, 0, 0, 0, 0, absent, absent, there, int(sys.argv[1]))
with open("/proc/self/pagemap", "rb") as pagemap:
    try:
        print(fcntl.ioctl(pagemap, 0xC0606610, bytearray(question)))
    except OSError as error:
        print(-error.errno)
"""
_PRESENT, _UNKNOWN = 1 << 3, 1 << 40


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    build_shim(library)
    return library


def test_what_a_kernel_does_not_know_it_says_itself(shim: Path) -> None:
    """Or CRIU would go on to ask a kernel before 6.15 for its guard pages, and every dump fail."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "GODWIT_DIRTY_ONLY": "1"}

    def answer(told: int) -> int:
        argv = [sys.executable, "-c", _QUESTION, str(told)]
        return int(subprocess.check_output(argv, env=environment, text=True))

    assert answer(_PRESENT) == 0
    assert answer(_PRESENT | _UNKNOWN) == -errno.EINVAL
