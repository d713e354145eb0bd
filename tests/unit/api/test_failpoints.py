"""Failpoints act once, by name, and only when a directory was set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_api import failpoints


@pytest.fixture(autouse=True)
def _disabled_after() -> Iterator[None]:
    yield
    failpoints.enable("")


def test_without_the_setting_nothing_acts(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("error")
    failpoints.reach("here")
    assert (tmp_path / "here").exists()


def test_an_action_acts_once_and_leaves_a_trace(tmp_path: Path) -> None:
    failpoints.enable(str(tmp_path))
    (tmp_path / "here").write_text("error\n")
    failpoints.reach("elsewhere")
    with pytest.raises(OSError, match="failpoint here"):
        failpoints.reach("here")
    failpoints.reach("here")
    assert (tmp_path / "here.hit").exists()


def test_a_crash_is_a_sigkill(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("crash")
    code = (
        "import atexit, sys; from godwit_api import failpoints;"
        "atexit.register(print, 'cleaned up');"
        "failpoints.enable(sys.argv[1]); failpoints.reach('here'); print('came through')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    first = run()
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, "")
    second = run()
    assert (second.returncode, second.stdout) == (0, "came through\ncleaned up\n")


def test_a_pause_ends_with_its_file(tmp_path: Path) -> None:
    failpoints.enable(str(tmp_path))
    (tmp_path / "here").write_text("pause")
    thread = threading.Thread(target=failpoints.reach, args=("here",))
    thread.start()
    while not (tmp_path / "here.hit").exists():
        thread.join(0.01)
    assert thread.is_alive()
    (tmp_path / "here.go").touch()
    thread.join(10)
    assert not thread.is_alive()


def test_a_delay_lasts_at_least_as_long(tmp_path: Path) -> None:
    failpoints.enable(str(tmp_path))
    (tmp_path / "here").write_text("delay 0.05")
    start = time.monotonic()
    failpoints.reach("here")
    assert time.monotonic() - start >= 0.05


def test_a_directory_that_others_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(failpoints.FailpointError, match="others may write"):
        failpoints.enable(str(tmp_path))
    (tmp_path / "file").touch()
    for wrong in (str(tmp_path / "file"), "relative"):
        with pytest.raises(failpoints.FailpointError):
            failpoints.enable(wrong)
        assert not failpoints.enabled()


def test_a_missing_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    failpoints.enable(str(tmp_path / "new"))
    assert failpoints.enabled()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("action", ["explode", "delay", "delay -1", "delay x", "crash now", ""])
def test_what_is_no_action_is_told_and_left(
    tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failpoints.enable(str(tmp_path))
    (tmp_path / "here").write_text(action)
    failpoints.reach("here")
    assert (tmp_path / "here").exists()
    assert "does not fit" in capsys.readouterr().err


def test_no_error_where_none_is_possible(tmp_path: Path) -> None:
    failpoints.enable(str(tmp_path))
    (tmp_path / "here").write_text("error")
    failpoints.reach("here", can_fail=False)
    assert (tmp_path / "here").exists()
