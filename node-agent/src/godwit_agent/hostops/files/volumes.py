"""Directories of a node that are volumes of a pod (hostPath): where they leave, where they arrive.

On the target such a directory must be absent or empty: what is there later came with the
migration, and goes with it when it is given up. A path with a symbolic link in it is refused, so
that none leads elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from godwit_agent.hostops import procs
from godwit_agent.hostops.files.beneath import open_directory, remove
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath, Obstacle, Place, Volume
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.reasons import Reason


class HostVolumes:
    """The real ``Volumes``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def leaving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        return tuple(
            Obstacle(Reason.VOLUME_CANNOT_FOLLOW, f"volume {volume.name}: {fault}")
            for volume in volumes
            if (fault := self._source_fault(volume.path))
        )

    def arriving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        return tuple(
            Obstacle(Reason.VOLUME_CANNOT_FOLLOW, f"volume {volume.name}: {fault}")
            for volume in volumes
            if (fault := self._target_fault(volume.path))
        )

    def survey(self, volumes: Iterable[Volume]) -> tuple[Place, ...]:
        wanted = tuple(volumes)
        faults = self.arriving(wanted)
        if faults:
            raise Rejected(faults[0].reason, "; ".join(one.message for one in faults))
        return tuple(self._survey(volume) for volume in wanted)

    def make(self, places: Iterable[Place]) -> None:
        for place in places:
            try:
                self._make(place.path)
            except OSError as error:
                message = f"volume {place.name}: {error}"
                raise Aborted(Reason.COPY_FAILED, message) from error

    def remove(self, places: Iterable[Place]) -> None:
        for place in places:
            try:
                self._remove(place)
            except OSError as error:
                message = f"volume {place.name}: what was copied to {place.path} stays: {error}"
                raise Retryable(Reason.COPY_FAILED, message, delay_seconds=5.0) from error

    def _source_fault(self, path: HostPath) -> str | None:
        try:
            os.close(open_directory(self._layout, path))
        except OSError as error:
            return f"{path} of this node: {_said(error)}"
        if inner := [point for point in self._mounts() if point.startswith(f"{path}/")]:
            return f"{path} has other file systems mounted in it ({', '.join(inner[:4])})"
        return None

    def _target_fault(self, path: HostPath) -> str | None:
        try:
            fd = open_directory(self._layout, path)
        except FileNotFoundError:
            return self._parent_fault(path)
        except OSError as error:
            return f"{path} of the target: {_said(error)}"
        try:
            if os.listdir(fd):
                return (
                    f"{path} of the target is not empty; remove it there if it is what an earlier "
                    "migration has left behind, or choose another node"
                )
        finally:
            os.close(fd)
        return None

    def _parent_fault(self, path: HostPath) -> str | None:
        parent = posixpath.dirname(path)
        try:
            os.close(open_directory(self._layout, parent))
        except FileNotFoundError:
            return self._parent_fault(HostPath(parent))
        except OSError as error:
            return f"{parent} of the target: {_said(error)}"
        return None

    def _survey(self, volume: Volume) -> Place:
        try:
            fd = open_directory(self._layout, volume.path)
        except FileNotFoundError:
            return Place(volume.name, volume.path, self._first_missing(volume.path))
        try:
            about = os.fstat(fd)
        finally:
            os.close(fd)
        mode = stat.S_IMODE(about.st_mode)
        return Place(volume.name, volume.path, None, mode, about.st_uid, about.st_gid)

    def _first_missing(self, path: str) -> HostPath:
        parent = posixpath.dirname(path)
        try:
            os.close(open_directory(self._layout, parent))
        except FileNotFoundError:
            return self._first_missing(parent)
        return HostPath(path)

    def _make(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.close(open_directory(self._layout, path))
            return
        parent, name = posixpath.split(path)
        self._make(parent)
        fd = open_directory(self._layout, parent)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=fd)
        finally:
            os.close(fd)

    def _remove(self, place: Place) -> None:
        try:
            fd = open_directory(self._layout, place.path)
        except FileNotFoundError:
            return
        try:
            for name in os.listdir(fd):
                remove(fd, os.fsencode(name))
            if place.made is None:
                os.fchown(fd, place.uid, place.gid)
                os.fchmod(fd, place.mode)
        finally:
            os.close(fd)
        if place.made is not None:
            for path in _up(place.path, place.made):
                self._remove_empty(path)

    def _remove_empty(self, path: str) -> None:
        parent, name = posixpath.split(path)
        fd = open_directory(self._layout, parent)
        try:
            # somebody else may have put something beside it meanwhile
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _mounts(self) -> list[str]:
        text = Path(f"/proc/{self._layout.host_pid}/mountinfo").read_text()
        return [procs.unescape(line.split()[4]) for line in text.splitlines()]


def _up(path: str, top: str) -> Iterator[str]:
    """``path`` and the directories above it, up to ``top``."""
    while path.startswith(top):
        yield path
        path = posixpath.dirname(path)


def _said(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, NotADirectoryError):
        return "it is no directory; only directories are copied"
    if error.errno == 40:  # ELOOP
        return "a symbolic link is part of it; name the directory itself in the volume"
    return error.strerror or str(error)
