"""Files of a pod, copied in passes while it runs (``SourceFiles``).

A pass walks every tree and sends what differs from the last one by size, times
or inode; of large files only the pieces whose digest differs. Files that are
mapped for shared writing are read every time: their times may not tell.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from godwit_agent.hostops import pagedigest, procs
from godwit_agent.hostops.filerecords import (
    CHUNK,
    OPAQUE,
    UPPER,
    Kind,
    Record,
    encode,
    pack_attributes,
)
from godwit_agent.hostops.files import containerlog
from godwit_agent.hostops.files.beneath import open_directory
from godwit_agent.hostops.files.containerlog import LogCopier
from godwit_agent.hostops.files.filetrees import source_trees
from godwit_agent.hostops.files.netfiles import Unwritten
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import PodState, RoundStats
from godwit_agent.hostops.ports import CopySink
from godwit_api.errors import Aborted, Retryable
from godwit_api.reasons import Reason

Emit = Callable[[Record, bytes | memoryview], None]

_NOT_COPIED = ("security.selinux", "trusted.overlay.")
_CANNOT_FOLLOW = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
# a file changed this shortly before it was looked at may change again within the same time stamp
_RACY_NS = 50_000_000
_ZEROS = bytes(CHUNK)
_PRIVILEGED = stat.S_ISUID | stat.S_ISGID


@dataclass(slots=True)
class _Seen:
    signature: tuple[int, ...]
    digests: list[bytes] = field(default_factory=list)


class TreeCopier:
    """One tree and what was sent of it; ``root`` is an open directory."""

    def __init__(self, tree: str, root: int) -> None:
        self._tree = tree
        self._root = root
        self._seen: dict[bytes, _Seen] = {}
        self._overlay = tree == UPPER
        self.looked_ns = 0  # spent on files that are read each time

    def run(self, emit: Emit, mapped: frozenset[int], cancelled: Callable[[], bool]) -> None:
        """One pass. Names that vanish while it runs are left for the next."""
        present: set[bytes] = set()
        changed: list[tuple[bytes, os.stat_result]] = []
        # directories in which the target makes names anew, though nothing changes here
        touched: dict[bytes, os.stat_result] = {}
        names: dict[int, bytes] = {}
        device = os.fstat(self._root).st_dev
        self._directory(b".", self._root, os.fstat(self._root), emit, changed)
        present.add(b".")
        for top, directories, files, fd in os.fwalk(b".", dir_fd=self._root):
            around = b"." if top == b"." else top[2:], os.fstat(fd)
            directories.sort()
            keep = []
            for name in sorted(directories) + sorted(files):
                if cancelled():
                    raise Aborted(Reason.CANCELLED, "cancelled while files were copied")
                path = name if top == b"." else top[2:] + b"/" + name
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    about = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if about.st_dev != device:
                        continue
                    present.add(path)
                    if stat.S_ISDIR(about.st_mode):
                        keep.append(name)
                        inner = os.open(name, _DIRECTORY, dir_fd=fd)
                        try:
                            self._directory(path, inner, about, emit, changed)
                        finally:
                            os.close(inner)
                    else:
                        if self._entry(path, name, fd, about, emit, mapped, names):
                            touched.setdefault(*around)
            directories[:] = keep
        for path in sorted(self._seen.keys() - present, key=len):
            del self._seen[path]
            emit(Record(Kind.REMOVED, self._tree, path), b"")
        for path, about in reversed([*touched.items(), *changed]):
            emit(self._record(Kind.TIMES, path, about), b"")

    def close(self) -> None:
        os.close(self._root)

    def _directory(
        self,
        path: bytes,
        fd: int,
        about: os.stat_result,
        emit: Emit,
        changed: list[tuple[bytes, os.stat_result]],
    ) -> None:
        signature = _signature(about)
        former = self._seen.get(path)
        if former is not None and former.signature == signature:
            return
        attributes = _attributes(fd, overlay=self._overlay)
        opaque = self._overlay and _is_opaque(fd)
        kind = Kind.OPAQUE_DIRECTORY if opaque and former is None else Kind.DIRECTORY
        emit(self._record(kind, path, about), pack_attributes(attributes))
        self._seen[path] = _Seen(signature)
        changed.append((path, about))

    def _entry(
        self,
        path: bytes,
        name: bytes,
        fd: int,
        about: os.stat_result,
        emit: Emit,
        mapped: frozenset[int],
        names: dict[int, bytes],
    ) -> bool:
        """Whether the name is made anew."""
        mode = about.st_mode
        leader = names.setdefault(about.st_ino, path) if about.st_nlink > 1 else path
        signature = _signature(about)
        former = self._seen.get(path)
        same = former is not None and former.signature == signature
        if same and about.st_ino not in mapped:
            return False
        if stat.S_ISSOCK(mode):
            return False  # CRIU makes the names of sockets itself
        if leader != path and not stat.S_ISDIR(mode):
            emit(Record(Kind.HARDLINK, self._tree, path), leader)
            self._seen[path] = _Seen(signature)
        elif stat.S_ISREG(mode):
            looked_ns = self._file(path, name, fd, emit, former)
            if about.st_ino in mapped:
                self.looked_ns += looked_ns
            return False
        elif stat.S_ISLNK(mode):
            emit(self._record(Kind.SYMLINK, path, about), os.readlink(name, dir_fd=fd))
            self._seen[path] = _Seen(signature)
        elif self._overlay and stat.S_ISCHR(mode) and about.st_rdev == 0:
            emit(Record(Kind.REMOVED, self._tree, path), b"")
            self._seen[path] = _Seen(signature)
        else:
            emit(self._record(Kind.NODE, path, about, number=about.st_rdev), b"")
            self._seen[path] = _Seen(signature)
        return True

    def _file(
        self, path: bytes, name: bytes, directory: int, emit: Emit, former: _Seen | None
    ) -> int:
        """Nanoseconds of looking at the content; not of sending it."""
        looked_ns = 0
        fd = os.open(name, _FILE, dir_fd=directory)
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                return 0
            known = former.digests if former and former.signature[0] == about.st_ino else []
            fresh = 0 if known else 1
            header = self._record(Kind.FILE, path, about, number=fresh)
            attributes = _attributes(fd, overlay=self._overlay)
            emit(header, pack_attributes(attributes))
            digests: list[bytes] = []
            begin = time.monotonic_ns()
            for index, data in enumerate(_chunks(fd)):
                digest = pagedigest.fingerprint(data)
                digests.append(digest)
                looked_ns += time.monotonic_ns() - begin
                begin = time.monotonic_ns()
                if index < len(known) and known[index] == digest:
                    continue
                if data == _ZEROS[: len(data)]:
                    if not fresh:
                        record = Record(
                            Kind.HOLE, self._tree, path, size=len(data), number=index * CHUNK
                        )
                        emit(record, b"")
                    continue
                emit(Record(Kind.CONTENT, self._tree, path, number=index * CHUNK), data)
                begin = time.monotonic_ns()
            if digests and (attributes or about.st_mode & _PRIVILEGED):
                # writing takes the capabilities of a file away, and its set-user-ID bit
                emit(self._record(Kind.FILE, path, about), pack_attributes(attributes))
            emit(self._record(Kind.TIMES, path, about), b"")
            self._seen[path] = _Seen(_signature(about), digests)
            return looked_ns
        finally:
            os.close(fd)

    def _record(self, kind: Kind, path: bytes, about: os.stat_result, *, number: int = 0) -> Record:
        return Record(
            kind, self._tree, path, about.st_mode, about.st_uid, about.st_gid,
            about.st_mtime_ns, about.st_size, number,
        )  # fmt: skip


class HostSourceFiles:
    """The real ``SourceFiles``."""

    def __init__(self, layout: Layout, pod: PodState) -> None:
        self._pids = tuple(one.init_pid for one in pod.containers if one.init_pid)
        self._previous_ns = 0
        self._copiers: list[tuple[str, TreeCopier | LogCopier]] = []
        try:
            self._unwritten = Unwritten(self._pids)
        except OSError as error:
            raise Retryable(Reason.COPY_FAILED, f"network file system: {error}") from error
        named = {volume.path for volume in pod.volumes}
        for container, tree, directory in source_trees(pod):
            try:
                root = (
                    open_directory(layout, directory)
                    if directory in named
                    else os.open(layout.local(directory), _DIRECTORY)
                )
            except OSError as error:
                if directory in named or not isinstance(error, FileNotFoundError):
                    self.close()
                    raise Retryable(Reason.COPY_FAILED, f"{directory}: {error}") from error
            else:
                self._copiers.append((container, TreeCopier(tree, root)))
        for one in pod.containers:
            with contextlib.suppress(FileNotFoundError):
                logs = layout.local(containerlog.directory_of(pod, one.name))
                self._copiers.append((one.name, LogCopier(os.open(logs, _DIRECTORY))))

    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        try:
            return self._pass(sink, cancelled)
        except OSError as error:
            raise Retryable(Reason.COPY_FAILED, f"files cannot be read: {error}") from error

    def final(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        try:
            return self._pass(sink, cancelled)
        except OSError as error:
            raise Aborted(Reason.COPY_FAILED, f"files cannot be read: {error}") from error

    def close(self) -> None:
        self._unwritten.close()
        for _, copier in self._copiers:
            copier.close()
        self._copiers.clear()

    def _pass(self, sink: CopySink, cancelled: Callable[[], bool]) -> RoundStats:
        begin, sent, looked_ns = time.monotonic_ns(), 0, 0
        mapped = self._mapped()

        for container, copier in self._copiers:

            def emit(record: Record, body: bytes | memoryview, to: str = container) -> None:
                nonlocal sent
                sent += len(body)
                sink.file(to, encode(record), memoryview(body))

            if isinstance(copier, TreeCopier):
                copier.looked_ns = 0
            copier.run(emit, mapped, cancelled)
            if isinstance(copier, TreeCopier):
                looked_ns += copier.looked_ns
        self._unwritten.flush()
        since = begin - self._previous_ns if self._previous_ns else 0
        self._previous_ns = begin
        took = time.monotonic_ns() - begin
        parts = {"files": took // 1000}
        return RoundStats(
            sent, sent, took // 1000, since // 1000, parts, freeze_us=looked_ns // 1000
        )

    def _mapped(self) -> frozenset[int]:
        """Inodes of files that are mapped shared and writable."""
        return frozenset(
            mapping.inode
            for init in self._pids
            for pid in procs.tree(init)
            for mapping in procs.mappings(pid)
            if mapping.inode and mapping.permissions[1] == "w" and mapping.permissions[3] == "s"
        )


def size_of(layout: Layout, pod: PodState, container: str) -> int:
    """Bytes that a copy of the container's files would read now."""
    total = 0
    for name, _, directory in source_trees(pod):
        if name != container or not layout.local(directory).is_dir():
            continue
        for _, _, files, fd in os.fwalk(layout.local(directory)):
            for file in files:
                with contextlib.suppress(OSError):
                    about = os.stat(file, dir_fd=fd, follow_symlinks=False)
                    total += min(about.st_size, about.st_blocks * 512)
    return total


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _signature(about: os.stat_result) -> tuple[int, ...]:
    """Equal for two looks at something that has not changed between them."""
    racy = time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < _RACY_NS
    return (
        about.st_ino, about.st_mode, about.st_uid, about.st_gid, about.st_size,
        about.st_mtime_ns, about.st_ctime_ns, time.time_ns() if racy else 0,
    )  # fmt: skip


def _attributes(fd: int, *, overlay: bool) -> dict[str, bytes]:
    found = {}
    for name in os.listxattr(fd):
        if overlay and name in _CANNOT_FOLLOW:
            message = f"the container's layer uses {name}, which other nodes cannot read"
            raise Aborted(Reason.FILE_CANNOT_FOLLOW, message)
        if not name.startswith(_NOT_COPIED):
            found[name] = os.getxattr(fd, name)
    return found


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:
        return False


def _chunks(fd: int) -> Iterator[bytes]:
    offset = 0
    while data := os.pread(fd, CHUNK, offset):
        yield data
        if len(data) < CHUNK:
            return
        offset += len(data)
