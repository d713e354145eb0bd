"""Records of the file copy, applied in memory: what a tree had become, as a tar.

Only the content of files is on disk, in a directory for the purpose: neither rights nor
a file system that knows devices, owners or attributes are needed.
"""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import CHUNK, Kind, Record
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason


@dataclass(slots=True)
class _Node:
    record: Record
    attributes: dict[str, bytes]
    content: Path | None = None  # of a regular file
    target: bytes = b""  # of a symbolic link


class Tree:
    """One directory and all below it; ``scratch`` is empty and stays ours."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        self._scratch = scratch
        self._files = 0
        self._open: tuple[Path, IO[bytes]] | None = None
        self._nodes: dict[bytes, _Node] = {}
        self.removed: set[bytes] = set()
        """What the layers below have and this one hides."""

    def apply(self, record: Record, body: bytes) -> None:
        """In the order of the copy; ``filetarget.TreeWriter`` is the same for a real directory."""
        match record.kind:
            case Kind.DIRECTORY | Kind.OPAQUE_DIRECTORY:
                self._directory(record, body)
            case Kind.FILE:
                self._file(record, body)
            case Kind.CONTENT:
                file = self._content(record.path)
                file.seek(record.number)
                file.write(body)
            case Kind.HOLE:
                file = self._content(record.path)
                file.seek(record.number)
                for at in range(0, record.size, CHUNK):
                    file.write(bytes(min(CHUNK, record.size - at)))
            case Kind.SYMLINK:
                self._put(record, _Node(record, {}, target=body))
            case Kind.HARDLINK:
                self._remove(record.path)
                self._nodes[record.path] = self._node(body)
            case Kind.NODE:
                self._put(record, _Node(record, {}))
            case Kind.TIMES:
                node = self._node(record.path)
                node.record = _with_time(node.record, record.mtime_ns)
            case Kind.REMOVED:
                self._remove(record.path)
                self.removed.add(record.path)
            case Kind.POPULATED:
                pass

    def close(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def write(self, tar: tarfile.TarFile) -> None:
        self.close()
        names: dict[int, bytes] = {}
        for path, node in sorted(self._nodes.items()):
            if path == b".":
                continue
            first = names.setdefault(id(node), path)
            info = _info(path, node)
            if first != path:
                info.type, info.linkname, info.size = tarfile.LNKTYPE, _text(first), 0
                tar.addfile(info)
            elif node.content is not None:
                with node.content.open("rb") as content:
                    tar.addfile(info, content)
            else:
                tar.addfile(info)

    def __bool__(self) -> bool:
        return bool(self.removed or self._nodes.keys() - {b"."})

    def _directory(self, record: Record, body: bytes) -> None:
        former = self._nodes.get(record.path)
        same = former is not None and stat.S_ISDIR(former.record.mode)
        if not same or record.kind is Kind.OPAQUE_DIRECTORY:
            self._remove(record.path)
        self._nodes[record.path] = _Node(record, filerecords.unpack_attributes(body))

    def _file(self, record: Record, body: bytes) -> None:
        former = self._nodes.get(record.path)
        content = former.content if former else None
        if record.number or content is None:
            self._remove(record.path)
            self._files += 1
            content = self._scratch / str(self._files)
            former = None
        self._writer(content).truncate(record.size)
        attributes = filerecords.unpack_attributes(body)
        if former is None:
            self._nodes[record.path] = _Node(record, attributes, content)
        else:  # all of its names
            former.record, former.attributes = record, attributes

    def _put(self, record: Record, node: _Node) -> None:
        self._remove(record.path)
        self._nodes[record.path] = node

    def _remove(self, path: bytes) -> None:
        below = path + b"/"
        if self._nodes.pop(path, None) is not None:
            for other in [one for one in self._nodes if one.startswith(below)]:
                del self._nodes[other]
        self.removed.discard(path)

    def _node(self, path: bytes) -> _Node:
        node = self._nodes.get(path)
        if node is None:
            raise Rejected(Reason.ARCHIVE_DAMAGED, f"file records: {path!r} is not there")
        return node

    def _content(self, path: bytes) -> IO[bytes]:
        content = self._node(path).content
        if content is None:
            raise Rejected(Reason.ARCHIVE_DAMAGED, f"file records: {path!r} is no file")
        return self._writer(content)

    def _writer(self, path: Path) -> IO[bytes]:
        """One is open at a time: there may be many."""
        if self._open is None or self._open[0] != path:
            self.close()
            path.touch()
            self._open = (path, path.open("r+b"))
        return self._open[1]


def as_tar(tree: Tree, path: Path) -> Path:
    """Written to ``path``."""
    with tarfile.open(path, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tree.write(tar)
    return path


def removed_names(tree: Tree) -> Iterator[str]:
    """As in ``deleted.files``: absolute."""
    for path in sorted(tree.removed):
        yield "/" + _text(path)


def _with_time(record: Record, mtime_ns: int) -> Record:
    return Record(
        record.kind, record.tree, record.path, record.mode, record.uid, record.gid,
        mtime_ns, record.size, record.number,
    )  # fmt: skip


def _info(path: bytes, node: _Node) -> tarfile.TarInfo:
    record = node.record
    info = tarfile.TarInfo(_text(path))
    info.mode = stat.S_IMODE(record.mode)
    info.uid, info.gid = record.uid, record.gid
    info.mtime = record.mtime_ns // 1_000_000_000
    info.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
        for key, value in node.attributes.items()
    }
    kind = stat.S_IFMT(record.mode)
    if node.content is not None:
        info.type, info.size = tarfile.REGTYPE, record.size
    elif kind == stat.S_IFDIR:
        info.type = tarfile.DIRTYPE
    elif kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, _text(node.target)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
    else:
        info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        info.devmajor, info.devminor = _device(record.number)
    return info


def _device(number: int) -> tuple[int, int]:
    """(major, minor), glibc's encoding of 64 bits, as ``st_rdev`` has it."""
    major = (number >> 8 & 0xFFF) | (number >> 32 & ~0xFFF)
    minor = (number & 0xFF) | (number >> 12 & ~0xFF)
    return major & 0xFFFFFFFF, minor & 0xFFFFFFFF


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
