"""Directories of a node that go along: copied to their place, taken away again, never elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from godwit_agent.hostops.filerecords import Kind, Record, decode
from godwit_agent.hostops.files.filesource import HostSourceFiles, size_of
from godwit_agent.hostops.files.filetarget import TargetFiles
from godwit_agent.hostops.files.filetrees import volume_tree
from godwit_agent.hostops.files.volumes import HostVolumes
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath, Place, Volume
from godwit_api.errors import GodwitError, Rejected
from host.test_mechanisms_files import Side, picture

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners, devices, overlays"),
]
LAYOUT = Layout(host_pid=os.getpid())


@pytest.fixture
def base() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield made
    shutil.rmtree(made)


def volume(path: Path) -> Volume:
    return Volume("data", HostPath(str(path)))


class Copy:
    """From ``base/a`` as the pod's volume to ``place``."""

    def __init__(self, base: Path, place: Place) -> None:
        (base / "image").mkdir(exist_ok=True)
        self.side = Side(base, "pod")
        state = replace(self.side.state(), volumes=(volume(base / "a"),))
        self.size = size_of(LAYOUT, state, "main")
        self.source = HostSourceFiles(LAYOUT, state)
        (base / "staging").mkdir()
        self.target = TargetFiles(LAYOUT, {"main": str(base / "staging")}, (place,))

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self.target.apply(container, decode(header), body)

    def pages(self, *_: object) -> None: ...
    def zero(self, *_: object) -> None: ...

    def close(self) -> None:
        self.source.close()
        self.target.close()
        subprocess.run(("umount", str(self.side.root)), check=True)


def fill(directory: Path) -> None:
    (directory / "deep/er").mkdir(parents=True)
    (directory / "deep/er/file").write_bytes(os.urandom(1 << 20))
    (directory / "deep/link").symlink_to("/etc/passwd")
    (directory / "deep").chmod(0o2770)
    os.chown(directory, 7, 8)
    directory.chmod(0o750)


def test_content_goes_to_its_place_in_rounds(base: Path) -> None:
    (base / "a").mkdir()
    fill(base / "a")
    there = base / "srv/deep/a"
    (place,) = HostVolumes(LAYOUT).survey([volume(there)])
    assert place.made == str(base / "srv")
    HostVolumes(LAYOUT).make([place])
    copy = Copy(base, place)
    try:
        assert copy.size >= 1 << 20
        copy.source.round(copy)
        assert picture(there) == picture(base / "a")
        assert (there.stat().st_uid, there.stat().st_mode & 0o7777) == (7, 0o750)
        (base / "a/deep/er/file").write_text("changed")
        (base / "a/deep/link").unlink()
        copy.target.bind(copy.side.state())
        copy.source.final(copy)
        assert picture(there) == picture(base / "a")
    finally:
        copy.close()
    HostVolumes(LAYOUT).remove([place])
    assert not (base / "srv").exists()
    assert (base / "a/deep/er/file").read_text() == "changed"


def test_an_empty_directory_is_as_it_was_afterwards(base: Path) -> None:
    there = base / "there"
    there.mkdir(mode=0o711)
    os.chown(there, 3, 4)
    (place,) = HostVolumes(LAYOUT).survey([volume(there)])
    assert place.made is None
    fill(there)
    (base / "precious").write_text("x")
    (there / "way-out").symlink_to(base / "precious")
    HostVolumes(LAYOUT).remove([place])
    about = there.stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o7777) == (3, 4, 0o711)
    assert not list(there.iterdir())
    assert (base / "precious").read_text() == "x"


def test_what_others_put_beside_it_stays(base: Path) -> None:
    (place,) = HostVolumes(LAYOUT).survey([volume(base / "srv/a")])
    HostVolumes(LAYOUT).make([place])
    (base / "srv/others").write_text("x")
    HostVolumes(LAYOUT).remove([place])
    assert not (base / "srv/a").exists()
    assert (base / "srv/others").read_text() == "x"


def test_a_directory_with_something_in_it_is_refused(base: Path) -> None:
    (base / "there").mkdir()
    (base / "there/file").write_text("x")
    (found,) = HostVolumes(LAYOUT).arriving([volume(base / "there")])
    assert "not empty" in found.message
    with pytest.raises(Rejected):
        HostVolumes(LAYOUT).survey([volume(base / "there")])


def test_links_are_not_followed(base: Path) -> None:
    (base / "real").mkdir()
    (base / "link").symlink_to(base / "real")
    volumes = HostVolumes(LAYOUT)
    for path in (base / "link", base / "link/inner", base / "link/inner/most"):
        (found,) = volumes.arriving([volume(path)])
        assert "symbolic link" in found.message
    (found,) = volumes.leaving([volume(base / "link")])
    assert "symbolic link" in found.message


def test_a_link_that_appears_later_leads_nowhere(base: Path) -> None:
    (place,) = HostVolumes(LAYOUT).survey([volume(base / "there")])
    HostVolumes(LAYOUT).make([place])
    (base / "real").mkdir()
    (base / "real/file").write_text("x")
    (base / "there").rmdir()
    (base / "there").symlink_to(base / "real")
    with pytest.raises(GodwitError):
        HostVolumes(LAYOUT).remove([place])
    target = TargetFiles(LAYOUT, {"main": str(base)}, (place,))
    record = Record(Kind.FILE, volume_tree("data"), b"new", 0o100644)
    with pytest.raises(GodwitError):
        target.apply("main", record, memoryview(b""))
    assert [path.name for path in (base / "real").iterdir()] == ["file"]


def test_a_source_that_cannot_be_copied(base: Path) -> None:
    (base / "file").write_text("x")
    (base / "a/in ner").mkdir(parents=True)
    volumes = HostVolumes(LAYOUT)
    assert volumes.leaving([volume(base / "a")]) == ()
    (found,) = volumes.leaving([volume(base / "none")])
    assert "not there" in found.message
    (found,) = volumes.leaving([volume(base / "file")])
    assert "no directory" in found.message
    subprocess.run(("mount", "-t", "tmpfs", "x", str(base / "a/in ner")), check=True)
    try:
        (found,) = volumes.leaving([volume(base / "a")])
        assert "mounted in it" in found.message
    finally:
        subprocess.run(("umount", str(base / "a/in ner")), check=True)
