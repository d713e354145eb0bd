"""Archives in the directory of the node that the installation allows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from godwit_agent.hostops.layout import Layout
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
SUFFIX = ".godwit"


class Archives:
    """``<directory>/<namespace>/<name>.godwit``, for root only, complete or not there."""

    def __init__(self, layout: Layout, directory: str) -> None:
        self._root = layout.local(directory)

    def exists(self, namespace: str, name: str) -> bool:
        return self._path(namespace, name).exists()

    @contextlib.contextmanager
    def read(self, namespace: str, name: str) -> Iterator[BinaryIO]:
        """``Rejected(ArchiveNotFound)``."""
        try:
            fd = os.open(self._path(namespace, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            message = f"no archive {namespace}/{name} on this node: {error.strerror}"
            raise Rejected(Reason.ARCHIVE_NOT_FOUND, message) from error
        with os.fdopen(fd, "rb") as file:
            yield file

    @contextlib.contextmanager
    def write(self, namespace: str, name: str) -> Iterator[BinaryIO]:
        """Appears under its name when it is complete and on disk, never over another one."""
        path = self._path(namespace, name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, path)
            except FileExistsError as error:
                message = f"there is an archive {namespace}/{name} already"
                raise Rejected(Reason.ARCHIVE_EXISTS, message) from error
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)

    def _path(self, namespace: str, name: str) -> Path:
        if not _NAME.match(namespace) or not _NAME.match(name) or ".." in name:
            raise Rejected(Reason.MALFORMED, f"{namespace}/{name} is no name of an archive")
        return self._root / namespace / f"{name}{SUFFIX}"


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
