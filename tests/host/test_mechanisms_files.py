"""What a container sees of its files is the same on both sides, pass after pass."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops.filerecords import Kind, Record, decode
from godwit_agent.hostops.files.filesource import HostSourceFiles
from godwit_agent.hostops.files.filetarget import TargetFiles
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath, Mount, PodState, Sandbox
from godwit_api.errors import GodwitError

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners, devices, overlays"),
]


# struct vfs_cap_data of linux/capability.h: revision 2, effective, CAP_NET_RAW permitted
_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


class Side:
    """An overlay over a common image, and an emptyDir."""

    def __init__(self, base: Path, name: str) -> None:
        self.base = base / name
        for part in ("upper", "work", "root", "volumes/kubernetes.io~empty-dir/data"):
            (self.base / part).mkdir(parents=True)
        options = f"lowerdir={base}/image,upperdir={self.base}/upper,workdir={self.base}/work"
        mount = ("mount", "-t", "overlay", "overlay", "-o", options, str(self.base / "root"))
        subprocess.run(mount, check=True)

    @property
    def root(self) -> Path:
        return self.base / "root"

    @property
    def data(self) -> Path:
        return self.base / "volumes/kubernetes.io~empty-dir/data"

    def state(self) -> PodState:
        path = HostPath("/nowhere")
        container = Container(
            "c", "main", 0, path, path, HostPath(str(self.root)),
            HostPath(str(self.base / "upper")), {}, (), (Mount("/data", str(self.data), "bind"),),
        )  # fmt: skip
        return PodState("u", "ns", "n", Sandbox("s", 1, path, 1), (container,), None)


class World:
    def __init__(self, base: Path) -> None:
        image = base / "image"
        for name in ("etc", "opt/old", "opt/deep/er"):
            (image / name).mkdir(parents=True)
        (image / "etc/conf").write_text("from the image")
        (image / "opt/old/gone").write_text("x")
        (image / "opt/deep/er/file").write_text("y")
        self.a, self.b = Side(base, "a"), Side(base, "b")
        layout = Layout(host_pid=os.getpid())
        (base / "staging").mkdir()
        self.source = HostSourceFiles(layout, self.a.state())
        self.target = TargetFiles(layout, {"main": str(base / "staging")})

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self.target.apply(container, decode(header), body)

    def pages(self, *_: object) -> None: ...
    def zero(self, *_: object) -> None: ...

    def close(self) -> None:
        self.source.close()
        self.target.close()
        for side in (self.a, self.b):
            subprocess.run(("umount", str(side.root)), check=True)


@pytest.fixture
def world() -> Iterator[World]:
    base = Path(tempfile.mkdtemp(dir="/var/tmp"))
    made = World(base)
    yield made
    made.close()
    shutil.rmtree(base)


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a container could see below ``root``."""
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        content: object = None
        if stat.S_ISREG(about.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(about.st_mode):
            content = str(path.readlink())
        name = str(path.relative_to(root))
        leader = groups.setdefault(about.st_ino, name) if about.st_nlink > 1 else name
        leader = name if stat.S_ISDIR(about.st_mode) else leader
        attributes = (
            {}
            if path.is_symlink()
            else {
                key: os.getxattr(path, key)
                for key in os.listxattr(path)
                if key.startswith("user.") or key == "security.capability"
            }
        )
        found[name] = (
            about.st_mode, about.st_uid, about.st_gid, about.st_mtime_ns, about.st_rdev,
            content, leader, attributes,
        )  # fmt: skip
    return found


def fill(side: Side) -> None:
    root = side.root
    (root / "etc/conf").write_text("changed")
    (root / "etc/conf").chmod(0o4700)
    shutil.rmtree(root / "opt/old")
    shutil.rmtree(root / "opt/deep")
    (root / "opt/deep").mkdir()  # opaque: hides what the image has there
    (root / "opt/deep/new").write_text("z")
    (root / "own").mkdir(mode=0o1777)
    os.mkfifo(root / "own/fifo")
    os.mknod(root / "own/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (root / "own/link").symlink_to("/etc/shadow")
    os.lchown(root / "own/link", 5, 6)
    (side.data / "big").write_bytes(os.urandom(3 << 20))
    os.setxattr(side.data / "big", "user.note", b"attribute")
    os.link(side.data / "big", side.data / "twin")
    (side.data / b"odd \xff\nname".decode(errors="surrogateescape")).write_text("1")


def change(side: Side) -> None:
    root = side.root
    (root / "own/link").unlink()
    (root / "own/link").mkdir()
    (root / "own/link/inside").write_text("a directory now")
    (root / "opt/deep/new").unlink()
    (root / "etc/conf").rename(root / "etc/other")
    with (side.data / "big").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(2 << 20)
    os.utime(root / "own", ns=(1, 1))


def same(world: World) -> None:
    assert picture(world.a.root) == picture(world.b.root)
    assert picture(world.a.data) == picture(world.b.data)


@pytest.mark.parametrize("bind_after", ["first", "second", "none"])
def test_passes_make_both_sides_the_same(world: World, bind_after: str) -> None:
    def bind(now: str) -> None:
        if bind_after == now:
            world.target.bind(world.b.state())

    fill(world.a)
    world.source.round(world)
    bind("first")
    change(world.a)
    world.source.round(world)
    bind("second")
    (world.a.root / "last").write_text("in the freeze")
    (world.a.data / "twin").unlink()
    stats = world.source.final(world)
    assert stats.copied_bytes < 3 << 20
    bind("none")
    world.source.final(world)
    same(world)


def test_capabilities_survive_the_content(world: World) -> None:
    """Writing to a file takes them away; here they come after the content."""
    program = world.a.root / "program"
    program.write_bytes(os.urandom(2 << 20))
    os.setxattr(program, "security.capability", _NET_RAW)
    world.source.round(world)
    world.target.bind(world.b.state())
    with program.open("ab") as file:
        file.write(b"more")
    os.setxattr(program, "security.capability", _NET_RAW)
    world.source.final(world)
    same(world)
    assert os.getxattr(world.b.root / "program", "security.capability") == _NET_RAW


def test_a_link_made_anew_leaves_its_directory_its_time(world: World) -> None:
    (world.a.data / "text").write_text("one")
    (world.a.data / "inner").mkdir()
    os.link(world.a.data / "text", world.a.data / "inner/twin")
    os.utime(world.a.data / "inner", ns=(1, 10**18))
    world.target.bind(world.b.state())
    world.source.round(world)
    (world.a.data / "text").chmod(0o640)
    world.source.final(world)
    same(world)


def test_little_is_sent_when_little_has_changed(world: World) -> None:
    (world.a.data / "log").write_bytes(os.urandom(8 << 20))
    for side in (world.a.root, world.a.data):
        for path in (side, *side.rglob("*")):
            os.utime(path, ns=(10**18, 10**18))
    world.source.round(world)
    with (world.a.data / "log").open("ab") as file:
        file.write(b"one more line")
    assert world.source.round(world).copied_bytes < 1 << 20


@pytest.mark.parametrize(
    "attack",
    [
        lambda path: Record(Kind.FILE, "/data", b"way/" + path, 0o100644, number=1),
        lambda path: Record(Kind.CONTENT, "/data", b"way/" + path),
        lambda path: Record(Kind.REMOVED, "/data", b"way/" + path),
        lambda path: Record(Kind.TIMES, "/data", b"way/" + path),
    ],
)
def test_a_link_leads_nowhere(world: World, attack: Callable[[bytes], Record]) -> None:
    outside = world.a.base / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    link = Record(Kind.SYMLINK, "/data", b"way", 0o120777)
    world.target.bind(world.b.state())
    world.target.apply("main", link, memoryview(str(outside).encode()))
    with pytest.raises(GodwitError):
        world.target.apply("main", attack(b"victim"), memoryview(b""))
    assert (outside / "victim").read_text() == "untouched"


def test_a_tree_the_successor_does_not_have_is_refused(world: World) -> None:
    world.target.bind(world.b.state())
    record = Record(Kind.DIRECTORY, "/elsewhere", b"x", 0o40755)
    with pytest.raises(GodwitError):
        world.target.apply("main", record, memoryview(b""))
