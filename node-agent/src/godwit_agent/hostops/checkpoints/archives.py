"""Where archives are kept, and the directory of the node that the installation allows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.smallfiles import sync_directory
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
SUFFIX = ".godwit"


class Draft(Protocol):
    """An archive that is being written. Nobody sees it before ``commit``."""

    def write(self, data: bytes) -> int: ...
    def tell(self) -> int: ...
    def commit(self) -> None:
        """Complete and safe under its name when this returns; ``Rejected(ArchiveExists)`` when
        there is another one."""

    def discard(self) -> None:
        """Nothing of it stays; without effect after ``commit``."""


class Archives(Protocol):
    """Where archives are: ``Directory`` on this node, or ``objectstore.ObjectStore``.

    Every call may raise ``Rejected`` for what a person must mend, and ``Retryable``."""

    def place(self, namespace: str, name: str) -> str:
        """Where an archive is, for people."""

    def exists(self, namespace: str, name: str) -> bool: ...

    def begin(self, namespace: str, name: str, size: int) -> Draft:
        """Finds out, too, whether this can be written here; ``size``: about how many bytes."""

    def read(self, namespace: str, name: str) -> contextlib.AbstractContextManager[Archive]:
        """``Rejected(ArchiveNotFound)``."""

    def clean(self, namespace: str, name: str) -> None:
        """Removes what a process that has ended has left of a draft."""


class Archive(Protocol):
    """One that is being read, from its begin to its end."""

    def read(self, size: int) -> bytes: ...
    def tell(self) -> int: ...


class Directory:
    """``<directory>/<namespace>/<name>.godwit``, for root only, complete or not there."""

    def __init__(self, layout: Layout, directory: str) -> None:
        self._directory = directory
        self._root = layout.local(directory)

    def place(self, namespace: str, name: str) -> str:
        return f"{self._directory}/{archive_path(namespace, name)}"

    def exists(self, namespace: str, name: str) -> bool:
        return self._path(namespace, name).exists()

    def begin(self, namespace: str, name: str, size: int) -> FileDraft:
        """Where there is not enough room the write fails, and the pod runs on."""
        path = self._path(namespace, name)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return FileDraft(path)
        except OSError as error:
            message = f"no archive can be written to {self._directory}: {error.strerror}"
            raise Rejected(Reason.ARCHIVE_STORE, message) from error

    @contextlib.contextmanager
    def read(self, namespace: str, name: str) -> Iterator[BinaryIO]:
        try:
            fd = os.open(self._path(namespace, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            message = f"no archive {namespace}/{name} on this node: {error.strerror}"
            raise Rejected(Reason.ARCHIVE_NOT_FOUND, message) from error
        with os.fdopen(fd, "rb") as file:
            yield file

    def clean(self, namespace: str, name: str) -> None:
        partial_of(self._path(namespace, name)).unlink(missing_ok=True)

    def _path(self, namespace: str, name: str) -> Path:
        return self._root / archive_path(namespace, name)


class FileDraft:
    """A file of another name beside the one that it becomes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = partial_of(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._partial, flags, 0o600), "wb")

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            os.link(self._partial, self._path)
        except FileExistsError as error:
            raise exists_already(self._path.parent.name, self._path.name) from error
        self.discard()
        sync_directory(self._path.parent)

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def archive_path(namespace: str, name: str) -> str:
    """Below the root of any store."""
    if not _NAME.match(namespace) or not _NAME.match(name) or ".." in name:
        raise Rejected(Reason.MALFORMED, f"{namespace}/{name} is no name of an archive")
    return f"{namespace}/{name}{SUFFIX}"


def exists_already(namespace: str, name: str) -> Rejected:
    name = name.removesuffix(SUFFIX)
    return Rejected(Reason.ARCHIVE_EXISTS, f"there is an archive {namespace}/{name} already")


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
