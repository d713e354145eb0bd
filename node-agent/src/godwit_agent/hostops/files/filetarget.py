"""Files of a pod on its target: staged first, in the successor's own directories later.

Paths come from another machine: nothing is opened but relative to its tree,
name by name, and no link is followed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import CHUNK, LOG, OPAQUE, UPPER, Kind, Record
from godwit_agent.hostops.files.beneath import open_directory, remove
from godwit_agent.hostops.files.containerlog import LogCopier
from godwit_agent.hostops.files.filesource import TreeCopier
from godwit_agent.hostops.files.filetrees import target_trees, volume_tree
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Place, PodState
from godwit_api.errors import Aborted, Rejected
from godwit_api.reasons import Reason

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class TreeWriter:
    """Applies records to one directory. ``raw`` keeps what hides files of an image as the
    overlay's own marks; otherwise it is done to the mounted root."""

    def __init__(self, root: int, *, raw: bool) -> None:
        self._root = root
        self._raw = raw
        self._file: tuple[bytes, int] | None = None

    def apply(self, record: Record, body: memoryview) -> None:
        if self._file and self._file[0] != record.path:
            self._close_file()
        if record.path == b".":
            if record.kind is Kind.TIMES:
                os.utime(self._root, ns=(record.mtime_ns, record.mtime_ns))
            elif record.kind in (Kind.DIRECTORY, Kind.OPAQUE_DIRECTORY):
                self._dress(self._root, record, body)
            return
        with filerecords.parent(self._root, record.path) as (directory, name):
            self._apply(record, body, directory, name)

    def close(self) -> None:
        self._close_file()
        os.close(self._root)

    def _apply(self, record: Record, body: memoryview, directory: int, name: bytes) -> None:
        match record.kind:
            case Kind.DIRECTORY | Kind.OPAQUE_DIRECTORY:
                self._make_directory(record, body, directory, name)
            case Kind.FILE:
                self._make_file(record, body, directory, name)
            case Kind.CONTENT:
                fd = self._open_file(record.path, directory, name)
                done = 0
                while done < len(body):
                    done += os.pwrite(fd, body[done:], record.number + done)
            case Kind.HOLE:
                fd = self._open_file(record.path, directory, name)
                _punch(fd, record.number, record.size)
            case Kind.SYMLINK:
                if b"\0" in (target := bytes(body)):
                    raise Rejected(Reason.MALFORMED, "file record: a link to no path")
                remove(directory, name)
                os.symlink(target, name, dir_fd=directory)
                os.chown(name, record.uid, record.gid, dir_fd=directory, follow_symlinks=False)
                self._times(record, directory, name)
            case Kind.HARDLINK:
                filerecords.check_path(bytes(body))
                remove(directory, name)
                with filerecords.parent(self._root, bytes(body)) as (other, old):
                    os.link(
                        old, name, src_dir_fd=other, dst_dir_fd=directory, follow_symlinks=False
                    )
            case Kind.NODE:
                self._make_node(record, directory, name)
            case Kind.TIMES:
                self._times(record, directory, name)
            case Kind.REMOVED:
                remove(directory, name)
                if self._raw:
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory)

    def _make_directory(
        self, record: Record, body: memoryview, directory: int, name: bytes
    ) -> None:
        if record.kind is Kind.OPAQUE_DIRECTORY or not _is(stat.S_ISDIR, directory, name):
            remove(directory, name)
            os.mkdir(name, 0o700, dir_fd=directory)
        fd = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            self._dress(fd, record, body)
            if self._raw and record.kind is Kind.OPAQUE_DIRECTORY:
                os.setxattr(fd, OPAQUE, b"y")
        finally:
            os.close(fd)

    def _make_file(self, record: Record, body: memoryview, directory: int, name: bytes) -> None:
        self._close_file()
        if record.number or not _is(stat.S_ISREG, directory, name):
            remove(directory, name)
            fd = os.open(
                name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory
            )
            self._file = (record.path, fd)
        fd = self._open_file(record.path, directory, name)
        os.ftruncate(fd, record.size)
        self._dress(fd, record, body)

    def _make_node(self, record: Record, directory: int, name: bytes) -> None:
        if not (
            stat.S_ISFIFO(record.mode) or stat.S_ISCHR(record.mode) or stat.S_ISBLK(record.mode)
        ):
            raise Rejected(Reason.MALFORMED, "file record: no fifo and no device")
        remove(directory, name)
        os.mknod(name, record.mode, record.number, dir_fd=directory)
        os.chown(name, record.uid, record.gid, dir_fd=directory, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(record.mode), dir_fd=directory)
        self._times(record, directory, name)

    def _dress(self, fd: int, record: Record, body: memoryview) -> None:
        """Owner before mode: a change of owner takes the set-user-ID bit away."""
        os.fchown(fd, record.uid, record.gid)
        os.fchmod(fd, stat.S_IMODE(record.mode))
        for key, value in filerecords.unpack_attributes(bytes(body)).items():
            os.setxattr(fd, key, value)

    def _open_file(self, path: bytes, directory: int, name: bytes) -> int:
        if self._file is None:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=directory)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise Rejected(Reason.MALFORMED, f"{path!r} is no regular file")
            self._file = (path, fd)
        return self._file[1]

    def _close_file(self) -> None:
        if self._file:
            os.close(self._file[1])
            self._file = None

    def _times(self, record: Record, directory: int, name: bytes) -> None:
        self._close_file()
        times = (record.mtime_ns, record.mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)


class TargetFiles:
    """All trees of one migration; ``staging`` names a host directory per container. Volumes that
    are the node's directories are written to their places at once."""

    def __init__(
        self, layout: Layout, staging: Mapping[str, str], places: Iterable[Place] = ()
    ) -> None:
        self._layout = layout
        self._staging = staging
        self._places = {volume_tree(place.name): place.path for place in places}
        self._writers: dict[tuple[str, str], TreeWriter] = {}
        self._bound: dict[str, Mapping[str, str]] = {}
        self._lock = threading.Lock()

    def apply(self, container: str, record: Record, body: memoryview) -> None:
        with self._lock:
            try:
                self._writer(container, record.tree).apply(record, body)
            except OSError as error:
                message = f"container {container}: {record.tree} {record.path!r}: {error}"
                raise Aborted(Reason.COPY_FAILED, message) from error

    def bind(self, successor: PodState) -> None:
        with self._lock:
            for container in successor.containers:
                if container.name in self._staging and container.name not in self._bound:
                    try:
                        self._place(container.name, target_trees(successor, container))
                    except OSError as error:
                        message = f"container {container.name}: {error}"
                        raise Aborted(Reason.COPY_FAILED, message) from error

    def close(self) -> None:
        with self._lock:
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()

    def _place(self, container: str, trees: Mapping[str, str]) -> None:
        """Moves on from the staged copy to the real one."""
        staged = [
            tree for name, tree in self._writers if name == container and tree not in self._places
        ]
        for tree in staged:
            self._writers.pop((container, tree)).close()
        self._bound[container] = trees
        for tree in staged:
            root = os.open(self._staged(container, tree), _DIRECTORY)
            copier = LogCopier(root) if tree == LOG else TreeCopier(tree, root)
            writer = self._writer(container, tree)
            try:
                copier.run(
                    lambda record, body, to=writer: to.apply(record, memoryview(body)),  # type: ignore[misc]
                    frozenset(),
                    lambda: False,
                )
            finally:
                copier.close()

    def _writer(self, container: str, tree: str) -> TreeWriter:
        writer = self._writers.get((container, tree))
        if writer is None:
            writer = self._writers[container, tree] = self._open(container, tree)
        return writer

    def _open(self, container: str, tree: str) -> TreeWriter:
        place = self._places.get(tree)
        if place is not None:
            return TreeWriter(open_directory(self._layout, place), raw=False)
        trees = self._bound.get(container)
        if trees is None:
            path = self._staged(container, tree)
            path.mkdir(mode=0o700, exist_ok=True)
            return TreeWriter(os.open(path, _DIRECTORY), raw=tree == UPPER)
        directory = trees.get(tree)
        if directory is None:
            message = f"container {container}: the successor has no {tree}"
            raise Aborted(Reason.COPY_FAILED, message)
        return TreeWriter(os.open(self._layout.local(directory), _DIRECTORY), raw=False)

    def _staged(self, container: str, tree: str) -> Path:
        return self._layout.local(self._staging[container]) / tree.encode().hex()


def _is(kind: object, directory: int, name: bytes) -> bool:
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return bool(kind(mode))  # type: ignore[operator]


def _punch(fd: int, offset: int, length: int) -> None:
    if not length or not _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        return
    number = ctypes.get_errno()
    if number != errno.EOPNOTSUPP:
        raise OSError(number, os.strerror(number))
    end = min(offset + length, os.fstat(fd).st_size)
    zeros = bytes(CHUNK)
    for at in range(offset, end, CHUNK):
        os.pwrite(fd, zeros[: min(CHUNK, end - at)], at)
