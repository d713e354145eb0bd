"""What CRIU reads in the freeze instead of smaps says the same, or is smaps itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops.criu import vmaflags

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
]
_NATIVE = Path(__file__).parents[2] / "node-agent" / "native"
_SOURCES = [str(_NATIVE / name) for name in ("criu-vmas.c", "criu-shared.c")]
# Maps some memory, then does what it is told line by line.
_SUBJECT = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def anonymous(at, pages, protection=3):
    fixed = 0x10 if at else 0
    return libc.mmap(at, pages * 4096, protection, 0x22 | fixed, -1, 0)
hole = anonymous(None, 64, 0)
block = anonymous(hole + 8 * 4096, 16)
assert libc.madvise(block, 16 * 4096, 10) == 0  # MADV_DONTFORK
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
_READ = """
import os, sys
process = os.open(f"/proc/{sys.argv[1]}", os.O_RDONLY | os.O_DIRECTORY)
with os.fdopen(os.open("smaps", os.O_RDONLY, dir_fd=process)) as file:
    sys.stdout.write(file.read())
"""
_LINES = re.compile(r"^(?:[0-9a-f]+-[0-9a-f]+ |VmFlags: ).*$", re.MULTILINE)


class Subject:
    """A process, its flags as they were kept, and CRIU's way to read them."""

    def __init__(self, directory: Path) -> None:
        self.library = directory / "vmas.so"
        flags = ("-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC")
        subprocess.run(["gcc", *flags, "-o", str(self.library), *_SOURCES], check=True)
        self.directory = directory / "flags"
        self.directory.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SUBJECT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready\n"
        vmaflags.keep(self.directory, [self.process.pid])

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def do(self, statement: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        assert self._answer() == "done\n"

    def read(self) -> tuple[list[str], bool]:
        """(ranges and flags, whether the kernel has looked at every page for it)."""
        done = subprocess.run(
            [sys.executable, "-c", _READ, str(self.process.pid)],
            env=os.environ | {"LD_PRELOAD": str(self.library), "GODWIT_FLAGS": str(self.directory)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return _LINES.findall(done.stdout), "Rss:" in done.stdout

    def truth(self) -> list[str]:
        return _LINES.findall(Path(f"/proc/{self.process.pid}/smaps").read_text())


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[Subject]:
    made = Subject(tmp_path)
    with made.process:
        yield made
        made.process.kill()


def test_unchanged(subject: Subject) -> None:
    lines, looked = subject.read()
    assert not looked
    assert lines == subject.truth()
    assert any(" dc " in line for line in lines)


def test_a_mapping_that_has_grown_keeps_its_flags(subject: Subject) -> None:
    """The kernel joins what has the same flags only."""
    subject.do("anonymous(block + 16 * 4096, 4); libc.madvise(block + 16 * 4096, 4 * 4096, 10)")
    lines, _ = subject.read()
    assert lines == subject.truth()


@pytest.mark.parametrize(
    "change",
    [
        "libc.madvise(block, 4096, 11)",  # MADV_DOFORK: split
        "anonymous(hole, 2, 1)",  # new, with other rights
        "anonymous(block + 16 * 4096, 4)",  # new, with other flags
        "libc.mlock(block, 4096)",
    ],
)
def test_what_is_not_known_is_asked_of_the_kernel(subject: Subject, change: str) -> None:
    subject.do(change)
    lines, looked = subject.read()
    assert looked
    assert lines == subject.truth()


def test_less_memory_is_the_kernels_word_too(subject: Subject) -> None:
    subject.do("libc.munmap(ctypes.c_void_p(block + 8 * 4096), ctypes.c_size_t(4 * 4096))")
    lines, _ = subject.read()
    assert lines == subject.truth()


def test_a_process_that_nobody_has_read(subject: Subject) -> None:
    (subject.directory / str(subject.process.pid)).unlink()
    lines, looked = subject.read()
    assert looked
    assert lines == subject.truth()
