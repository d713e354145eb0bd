"""Files: the writable layer, volumes, locks, maps, deleted ones."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

from .checks import Check, Unavailable, check, same
from .processes import ask, child, said

VOLUMES = {"layer": Path("/srv/own"), "disk": Path("/data"), "memory": Path("/memory")}


def picture(root: Path) -> dict[str, object]:
    """All that a program could see below ``root``."""
    found: dict[str, object] = {}
    leaders: dict[int, str] = {}
    for path in sorted((root, *root.rglob("*"))):
        about = path.lstat()
        name = str(path)
        content = ""
        if stat.S_ISREG(about.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(about.st_mode):
            content = str(path.readlink())
        attributes = sorted(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in os.listxattr(path, follow_symlinks=False)
        )
        size = 0 if stat.S_ISDIR(about.st_mode) else about.st_size
        links = leaders.setdefault(about.st_ino, name) if about.st_nlink > 1 else ""
        found[name] = (
            oct(about.st_mode), about.st_uid, about.st_gid, about.st_mtime_ns, about.st_rdev,
            size, content, "" if stat.S_ISDIR(about.st_mode) else links, attributes,
        )  # fmt: skip
    return found


def fill(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "text").write_text("first")
    os.chown(root / "text", 33, 44)
    (root / "text").chmod(0o4751)
    (root / "sticky").mkdir(mode=0o700)
    (root / "sticky").chmod(0o1777)
    (root / "link").symlink_to("/etc/passwd")
    os.lchown(root / "link", 5, 6)
    os.link(root / "text", root / "sticky" / "twin")
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(40 << 20)
        file.write(b"there")
    (root / b"odd \xff\nname".decode(errors="surrogateescape")).write_text("1")
    os.utime(root / "text", ns=(1, 1_234_567_891))
    (root / "deep").mkdir()
    for number in range(200):
        (root / "deep" / f"{number}").write_bytes(bytes([number]) * number)
    try:
        os.setxattr(root / "text", "user.note", b"attribute")
    except OSError as error:
        (root / "no-xattr").write_text(str(error))


def _tree(name: str) -> Check:
    root = VOLUMES[name]
    if name != "layer" and not root.is_dir():
        raise Unavailable(f"no {root}")
    root = root / "tree"
    root.parent.mkdir(exist_ok=True)
    fill(root)
    former = picture(root)
    while True:
        yield
        seen = picture(root)
        for path in sorted(former.keys() | seen.keys()):
            same(seen.get(path), former.get(path), path)
        blocks = (root / "sparse").stat().st_blocks * 512
        same(blocks < 8 << 20, True, f"{blocks} bytes of a sparse file are allocated")


@check
def writable_layer() -> Check:
    yield from _tree("layer")


@check
def volume_on_disk() -> Check:
    yield from _tree("disk")


@check
def volume_in_memory() -> Check:
    yield from _tree("memory")


@check
def device_node_and_file_capabilities() -> Check:
    root = Path("/srv/privileged")
    root.mkdir()
    try:
        os.mknod(root / "null", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    except PermissionError as error:
        raise Unavailable(f"mknod: {error}") from error
    shutil.copy("/bin/true", root / "program")
    setcap = shutil.which("setcap", path="/usr/sbin:/sbin:/usr/bin")
    if setcap:
        subprocess.run([setcap, "cap_net_raw+ep", str(root / "program")], check=True)
    former = picture(root)
    while True:
        yield
        same(picture(root), former)


@check
def whiteouts() -> Check:
    """A deleted file and a replaced directory of the image, a changed file."""
    root = Path("/srv/image")
    if not root.is_dir():
        raise Unavailable(f"no {root}")
    (root / "gone").unlink()
    shutil.rmtree(root / "hidden")
    (root / "hidden").mkdir()
    (root / "hidden" / "new").write_text("own")
    (root / "file").write_text("changed")
    former = picture(root)
    while True:
        yield
        same(picture(root), former)
        same((root / "gone").exists(), False, "gone")
        same(os.listdir(root / "hidden"), ["new"], "hidden")


def _deleted(directory: Path) -> Check:
    if not directory.is_dir():
        raise Unavailable(f"no {directory}")
    path = directory / "deleted"
    with path.open("w+b") as file:
        file.write(os.urandom(3 << 20))
        file.flush()
        digest = hashlib.sha256(os.pread(file.fileno(), 3 << 20, 0)).hexdigest()
        path.unlink()
        while True:
            yield
            seen = hashlib.sha256(os.pread(file.fileno(), 3 << 20, 0)).hexdigest()
            same(seen, digest)
            same(os.fstat(file.fileno()).st_nlink, 0, "links")
            same(path.exists(), False, "exists")


@check
def deleted_file_in_the_layer() -> Check:
    yield from _deleted(Path("/tmp"))


@check
def deleted_file_on_disk() -> Check:
    yield from _deleted(Path("/data"))


@check
def deleted_file_in_memory() -> Check:
    yield from _deleted(Path("/memory"))


@check
def deleted_file_in_dev_shm() -> Check:
    yield from _deleted(Path("/dev/shm"))


@check
def deleted_working_directory() -> Check:
    def body_start() -> None:
        Path("/tmp/short").mkdir()
        os.chdir("/tmp/short")
        Path("/tmp/short").rmdir()

    begun: list[bool] = []

    def answer() -> object:
        if not begun:
            body_start()
            begun.append(True)
        return os.readlink("/proc/self/cwd")

    _, peer = child(ask(answer))
    same(said(peer), "/tmp/short (deleted)")
    while True:
        yield
        same(said(peer), "/tmp/short (deleted)")


@check
def replaced_file() -> Check:
    """Open, but another file has the name now: as after a rename over it."""
    path = Path("/data/replaced")
    path.write_text("old")
    fd = os.open(path, os.O_RDONLY)
    Path("/data/replacement").write_text("new")
    Path("/data/replacement").replace(path)
    while True:
        yield
        same(os.pread(fd, 10, 0), b"old", "open file")
        same(path.read_text(), "new", "name")


@check
def record_locks() -> Check:
    path = Path("/data/locked")
    path.write_bytes(bytes(100))
    fd = os.open(path, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 20)

    def answer() -> object:
        mine = os.open(path, os.O_RDWR)
        request = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, start, length, _ = struct.unpack(
            "hhqqi", fcntl.fcntl(mine, fcntl.F_GETLK, request)
        )
        os.close(mine)
        return kind, start, length

    _, peer = child(ask(answer))
    while True:
        yield
        same(said(peer), str((fcntl.F_WRLCK, 20, 10)))


@check
def flock() -> Check:
    path = Path("/tmp/flocked")
    path.touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    while True:
        yield
        other = os.open(path, os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("the shared lock is gone")
        except BlockingIOError:
            pass
        os.close(other)


@check
def open_file_description_lock() -> Check:
    path = Path("/tmp/ofd")
    path.write_bytes(bytes(100))
    fd = os.open(path, os.O_RDWR)
    request = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 5, 5, 0)
    fcntl.fcntl(fd, 37, request)  # F_OFD_SETLK
    while True:
        yield
        other = os.open(path, os.O_RDWR)
        ask_all = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, start, length, _ = struct.unpack("hhqqi", fcntl.fcntl(other, 36, ask_all))
        os.close(other)
        same((kind, start, length), (fcntl.F_WRLCK, 5, 5))


def _mapped(path: Path) -> Check:
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    private_file = path.open("r+b")
    private = mmap.mmap(private_file.fileno(), 0, access=mmap.ACCESS_COPY)
    private[100:107] = b"private"
    number = 0
    while True:
        number += 1
        text = f"{number:08}".encode()
        area[50:58] = text
        yield
        same(bytes(area[50:58]), text, "shared map")
        same(path.read_bytes()[50:58], text, "file")
        same(bytes(private[100:107]), b"private", "private map")
        same(path.read_bytes()[100:107], bytes(7), "file behind the private map")
        with path.open("r+b") as file:
            file.seek(60)
            file.write(text)
        same(bytes(area[60:68]), text, "written to the file")


@check
def mapped_file_in_the_layer() -> Check:
    yield from _mapped(Path("/srv/mapped"))


@check
def mapped_file_on_disk() -> Check:
    yield from _mapped(Path("/data/mapped"))


@check
def directory_being_read() -> Check:
    path = Path("/data/listed")
    path.mkdir()
    for number in range(50):
        (path / str(number)).touch()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    while True:
        yield
        same(len(os.listdir(fd)), 50)
        same(os.stat("7", dir_fd=fd).st_size, 0, "relative to the descriptor")


@check
def open_devices() -> Check:
    null = os.open("/dev/null", os.O_RDWR)
    random = os.open("/dev/urandom", os.O_RDONLY)
    while True:
        yield
        same(os.write(null, b"x"), 1)
        same(len(os.read(random, 8)), 8)
