"""For all tests."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

# A shell ignores these for what it runs in the background, and whoever a test starts would inherit
# that: runc passes it on to a container, or does not (its own handlers are made beside its start).
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

settings.register_profile("godwit", deadline=None)  # a busy machine is no slow code
settings.load_profile("godwit")

_SOURCE = Path(__file__).parents[1] / "node-agent/native/pages.c"


@pytest.fixture(scope="session", autouse=True)
def pages_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The agent's own library, built from this checkout; part of its image (Dockerfile)."""
    path = tmp_path_factory.mktemp("native") / "pages.so"
    argv = ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o", str(path)]
    subprocess.run([*argv, str(_SOURCE)], check=True)
    os.environ["GODWIT_PAGES"] = str(path)
