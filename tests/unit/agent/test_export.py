"""What an archive gives to the container tools: their files, and memory where CRIU has it."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit_agent.archive import __main__ as command
from godwit_agent.archive import contents, exporting
from godwit_agent.archive.contents import Entry as Piece
from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import LOG, UPPER, Kind, Record
from godwit_agent.memory import pagemap
from godwit_agent.memory.pagemap import PE_LAZY, PE_PRESENT, Entry
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

KEY = bytes(range(32))
PAGE = 4096
POD = {
    "spec": {"containers": [{"name": "main", "image": "example.org/main:1"}]},
    "status": {
        "containerStatuses": [
            {
                "name": "main",
                "imageID": "sha256:abc",
                "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}},
            }
        ]
    },
}
ABOUT = {"containers": ["main"], "created": 1_800_000_000, "manifest": POD}


def _archive(*pieces: Piece, about: dict[str, Any] = ABOUT) -> io.BytesIO:
    file = io.BytesIO()
    fixed = (
        contents.whole("config.dump", b'{"id": "0123", "name": "main", "runtime": "runc"}'),
        contents.whole("spec.dump", b'{"ociVersion": "1.0"}'),
    )
    contents.write(file, KEY, contents.of_container("main", (*fixed, *pieces)), about)
    file.seek(0)
    return file


def _export(file: io.BytesIO, container: str = "main") -> dict[str, bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|") as tar:
        exporting.export(file, KEY, container, tar)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert tar.getmember("checkpoint").isdir()
        files = (one for one in tar if one.isreg())
        return {one.name: tar.extractfile(one).read() for one in files}  # type: ignore[union-attr]


def _image(name: str, data: bytes) -> Piece:
    return contents.whole(f"checkpoint/{name}", data)


def _page(number: int, of: int) -> bytes:
    return bytes([number % 251, of]) * (PAGE // 2)


def _process(criu: list[int], lazy: list[int], ours: list[int], zero: list[int]) -> list[Piece]:
    """A process whose pages are numbered; each tells where it was kept."""

    def runs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
        return tuple((n * PAGE, (n + 1) * PAGE) for n in sorted(numbers))

    entries = sorted(
        [
            *(Entry(n * PAGE, 1, PE_PRESENT) for n in criu),
            *(Entry(n * PAGE, 1, PE_PRESENT | PE_LAZY) for n in lazy),
        ],
        key=lambda entry: entry.vaddr,
    )
    return [
        _image("mm-1.img", b""),
        _image("pagemap-1.img", pagemap.encode(7, entries)),
        _image("pages-7.img", b"".join(_page(n, 1) for n in sorted(criu))),
        *contents.page_entries(
            1, runs(ours), runs(zero), iter([_page(n, 2) for n in sorted(ours)])
        ),
    ]


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 60), st.sampled_from(["criu", "ours", "zero", "both"])))
def test_memory_is_where_criu_would_have_put_it(kinds: dict[int, str]) -> None:
    """``both``: CRIU's own page is the one that counts, ours is older."""

    def of(*wanted: str) -> list[int]:
        return [number for number, kind in kinds.items() if kind in wanted]

    found = _export(
        _archive(*_process(of("criu", "both"), of("ours"), of("ours", "both"), of("zero")))
    )
    number, entries = pagemap.decode(found["checkpoint/pagemap-1.img"])
    pages = found[f"checkpoint/pages-{number}.img"]
    assert all(entry.flags == PE_PRESENT for entry in entries)
    seen = {}
    at = 0
    for entry in entries:
        for index in range(entry.pages):
            seen[entry.vaddr // PAGE + index] = pages[at : at + PAGE]
            at += PAGE
    assert at == len(pages)
    expected = {
        n: {"criu": _page(n, 1), "both": _page(n, 1), "ours": _page(n, 2), "zero": bytes(PAGE)}[k]
        for n, k in kinds.items()
    }
    assert seen == expected


def test_a_page_that_is_nowhere_is_no_zero() -> None:
    with pytest.raises(Rejected) as refused:
        _export(_archive(*_process([1], [5], [2], [3])))
    assert refused.value.reason is Reason.ARCHIVE_DAMAGED
    assert "0x5000" in refused.value.message


def test_config_says_what_the_pod_object_knows() -> None:
    found = _export(_archive(_image("core-1.img", b"registers")))
    config = json.loads(found["config.dump"])
    assert config == {
        "id": "0123",
        "name": "main",
        "runtime": "runc",
        "rootfsImageName": "example.org/main:1",
        "rootfsImageRef": "sha256:abc",
        "createdTime": "2026-01-02T03:04:05Z",
        "checkpointedTime": "2027-01-15T08:00:00+00:00",
    }
    assert found["spec.dump"] == b'{"ociVersion": "1.0"}'
    assert found["checkpoint/core-1.img"] == b"registers"


def test_a_container_that_is_not_there_is_named() -> None:
    with pytest.raises(Rejected) as refused:
        _export(_archive(), "other")
    assert "main" in refused.value.message


def _records(*records: tuple[Record, bytes]) -> Piece:
    data = b"".join(contents.record(filerecords.encode(one), body) for one, body in records)
    return contents.whole(contents.FILES, data)


def _record(kind: Kind, path: bytes, mode: int = 0o644, tree: str = UPPER, **more: int) -> Record:
    return Record(kind, tree, path, mode, 5, 6, 1_700_000_000_000_000_000, **more)


_REG, _DIR = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o750


def test_the_writable_layer_becomes_a_tar() -> None:
    attributes = filerecords.pack_attributes({"user.color": b"blue"})
    found = _export(
        _archive(
            _records(
                (_record(Kind.DIRECTORY, b".", _DIR), b""),
                (_record(Kind.DIRECTORY, b"d", _DIR), b""),
                (_record(Kind.FILE, b"d/file", _REG, size=10, number=1), attributes),
                (_record(Kind.CONTENT, b"d/file", number=0), b"0123456789"),
                (_record(Kind.HARDLINK, b"d/same"), b"d/file"),
                (_record(Kind.SYMLINK, b"link", stat.S_IFLNK | 0o777), b"d/file"),
                (_record(Kind.NODE, b"fifo", stat.S_IFIFO | 0o600), b""),
                (_record(Kind.NODE, b"null", stat.S_IFCHR | 0o666, number=0x103), b""),
                (_record(Kind.FILE, b"gone", _REG, number=1), b""),
                # a later round
                (_record(Kind.FILE, b"d/file", _REG, size=12), attributes),
                (_record(Kind.CONTENT, b"d/file", number=8), b"xyzw"),
                (_record(Kind.HOLE, b"d/file", number=0, size=2), b""),
                (_record(Kind.REMOVED, b"gone"), b""),
                (_record(Kind.REMOVED, b"etc/of-the-image"), b""),
                (_record(Kind.FILE, b"0.log", _REG, tree=LOG, number=1), b""),
                (_record(Kind.FILE, b"a", _REG, tree="/data", size=1, number=1), b""),
                (_record(Kind.FILE, b"b", _REG, tree="/dev/shm", size=1, number=1), b""),
            )
        )
    )
    assert json.loads(found["deleted.files"]) == ["/etc/of-the-image", "/gone"]
    with tarfile.open(fileobj=io.BytesIO(found["rootfs-diff.tar"])) as tar:
        by_name = {one.name: one for one in tar}
        assert set(by_name) == {"d", "d/file", "d/same", "link", "fifo", "null"}
        file = by_name["d/file"]
        assert (file.mode, file.uid, file.gid, file.mtime) == (0o640, 5, 6, 1_700_000_000)
        assert file.pax_headers["SCHILY.xattr.user.color"] == "blue"
        assert tar.extractfile(file).read() == bytes(2) + b"234567xyzw"  # type: ignore[union-attr]
        assert (by_name["d/same"].type, by_name["d/same"].linkname) == (tarfile.LNKTYPE, "d/file")
        assert (by_name["link"].type, by_name["link"].linkname) == (tarfile.SYMTYPE, "d/file")
        assert by_name["fifo"].isfifo()
        assert by_name["null"].ischr()
        assert (by_name["null"].devmajor, by_name["null"].devminor) == (1, 3)
        assert by_name["d"].mode == 0o750
    assert {"volumes/data.tar", "devshm-checkpoint.tar"} <= set(found)


def test_records_that_fit_nothing_are_refused() -> None:
    with pytest.raises(Rejected) as refused:
        _export(_archive(_records((_record(Kind.CONTENT, b"never", number=0), b"x"))))
    assert refused.value.reason is Reason.ARCHIVE_DAMAGED


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "one.godwit").write_bytes(_archive(_image("core-1.img", b"r")).getvalue())
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, key = str(files / "one.godwit"), str(files / "key")
    assert command.main(["show", archive, "--key", key]) == 0
    assert json.loads(capsys.readouterr().out) == {"containers": ["main"], "created": 1800000000}
    out = files / "out.tar"
    words = ["export", archive, "--key", key, "--container"]
    assert command.main([*words, "main", str(out)]) == 0
    with tarfile.open(out) as tar:
        assert "checkpoint/core-1.img" in tar.getnames()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert command.main([*words, "other", str(files / "never.tar")]) == 1
    assert "main" in capsys.readouterr().err


def test_nothing_is_left_of_an_export_that_fails(files: Path) -> None:
    archive = files / "one.godwit"
    archive.write_bytes(archive.read_bytes()[:-1])
    words = ["export", str(archive), "--key", str(files / "key"), "--container", "main"]
    assert command.main([*words, str(files / "out.tar")]) == 1
    assert sorted(path.name for path in files.iterdir()) == ["key", "one.godwit"]


def test_a_key_may_be_as_a_secret_has_it(files: Path) -> None:
    (files / "text").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
    assert command.read_key(files / "text") == KEY
    (files / "text").write_text("AAEC\n")
    with pytest.raises(Rejected):
        command.read_key(files / "text")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["export", "--help"]):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert "checkpointctl inspect" in said
        assert "not encrypted" in said
