"""What a process has written to a file system that both nodes mount reaches it before the target
reads. An ext4 in a file stands for the server: its content is what has been written back."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

from godwit_agent.hostops.files.netfiles import Unwritten

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4"),
]


def test_written_back_by_a_flush_and_not_before(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "with space"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(("mkfs.ext4", "-q", str(image)), check=True)
    subprocess.run(("mount", "-o", "loop", str(image), str(point)), check=True)
    try:
        unwritten = Unwritten([os.getpid()], {"ext4"})
        secret = secrets.token_bytes(64)
        (point / "file").write_bytes(secret)
        assert secret not in image.read_bytes()
        unwritten.flush()
        assert secret in image.read_bytes()
        unwritten.close()
    finally:
        subprocess.run(("umount", str(point)), check=True)
