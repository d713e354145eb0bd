"""The node as the installer sees it: its files below ``/proc/1/root``, its programs by nsenter."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Host:
    """One node; ``root`` and ``enter`` are replaced in tests."""

    def __init__(
        self,
        root: Path = Path("/proc/1/root"),
        enter: tuple[str, ...] = ("nsenter", "--target=1", "--mount", "--cgroup", "--"),
    ) -> None:
        self.root = root
        self._enter = enter

    def path(self, path: str) -> Path:
        """Where a path of the node is seen from here."""
        return Path(f"{self.root}{path}")

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the node."""
        return subprocess.run(
            [*self._enter, *argv],
            capture_output=True,
            text=True,
            env={"PATH": _PATH, "LC_ALL": "C"},
            check=False,
            timeout=120,
        )

    def knows_handler(self, containerd: str, handler: str) -> bool:
        """Whether the running containerd answers and has the runtime handler."""
        done = subprocess.run(
            [sys.executable, "-m", "godwit_agent.install.cri", str(self.path(containerd)), handler],
            capture_output=True,
            check=False,
            timeout=60,
        )
        return done.returncode == 0

    def which(self, program: str) -> str | None:
        """Absolute path of a program on the node; looked up without a shell."""
        for directory in _PATH.split(":"):
            candidate = f"{directory}/{program}"
            if os.access(self.path(candidate), os.X_OK):
                return candidate
        return None

    def read(self, path: str) -> str | None:
        """Text of a file; None when there is none."""
        try:
            return self.path(path).read_text()
        except FileNotFoundError:
            return None

    def answers(self, path: str) -> bool:
        """Whether somebody listens on a unix socket."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.connect(str(self.path(path)))
            return True
        return False

    def write(self, path: str, text: str, mode: int = 0o644) -> bool:
        """Make ``path`` hold ``text``; False when it did already."""
        if self.read(path) == text:
            return False
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.write_text(text)
        part.chmod(mode)
        part.rename(target)
        return True

    def copy(self, source: Path, path: str, mode: int = 0o755) -> None:
        """Put a file in place by renaming, so that a running one is replaced whole."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        shutil.copyfile(source, part)
        part.chmod(mode)
        part.rename(target)

    def link(self, path: str, to: str) -> None:
        """Make a symbolic link, replacing what is there."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.unlink(missing_ok=True)
        part.symlink_to(to)
        part.rename(target)

    def remove(self, path: str) -> None:
        """Delete a file or a directory of ours; nothing there is fine."""
        target = self.path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def remove_if_empty(self, path: str) -> None:
        """Delete a directory that holds nothing any more."""
        target = self.path(path)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()

    def subdirectories(self, path: str) -> list[str]:
        """Directories right below ``path``."""
        place = self.path(path)
        found = sorted(place.iterdir()) if place.is_dir() else []
        return [f"{path}/{item.name}" for item in found if item.is_dir()]

    def remove_cgroup(self, path: str) -> None:
        """Remove a cgroup and those below it; one that still has processes stays."""
        for directory, _, _ in os.walk(self.path(path), topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
