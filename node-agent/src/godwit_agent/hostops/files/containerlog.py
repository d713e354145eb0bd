"""The log of a container goes along, so that `kubectl logs` shows what was before the move.

The kubelet keeps ``/var/log/pods/<namespace>_<pod>_<uid>/<container>/<restarts>.log``
(kuberuntime/helpers.go). A successor's container has not been restarted, so its log
is number 0, which the runtime has opened to append to it (O_APPEND). What the kubelet has rotated
away stays behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from godwit_agent.hostops.filerecords import CHUNK, LOG, Kind, Record, pack_attributes
from godwit_agent.hostops.model import PodState

_NAME = b"0.log"
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def directory_of(pod: PodState, container: str) -> str:
    return f"/var/log/pods/{pod.namespace}_{pod.name}_{pod.uid}/{container}"


class LogCopier:
    """``root``: an open directory of one container's logs. Sends what was appended."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._inode = self._sent = 0

    def run(
        self,
        emit: Callable[[Record, bytes | memoryview], None],
        mapped: frozenset[int],
        cancelled: Callable[[], bool],
    ) -> None:
        name = self._newest()
        if name is None:
            return
        fd = os.open(name, _FILE, dir_fd=self._root)
        try:
            about = os.fstat(fd)
            if about.st_ino != self._inode or about.st_size < self._sent:
                self._inode, self._sent = about.st_ino, 0
            if about.st_size == self._sent:
                return
            header = Record(
                Kind.FILE, LOG, _NAME, about.st_mode, about.st_uid, about.st_gid,
                about.st_mtime_ns, about.st_size,
            )  # fmt: skip
            emit(header, pack_attributes({}))
            while self._sent < about.st_size and not cancelled():
                data = os.pread(fd, min(CHUNK, about.st_size - self._sent), self._sent)
                if not data:
                    return
                emit(Record(Kind.CONTENT, LOG, _NAME, number=self._sent), data)
                self._sent += len(data)
        finally:
            os.close(fd)

    def close(self) -> None:
        os.close(self._root)

    def _newest(self) -> str | None:
        numbers = [
            int(stem)
            for stem, dot, suffix in (name.partition(".") for name in os.listdir(self._root))
            if suffix == "log" and dot and stem.isdigit()
        ]
        return f"{max(numbers)}.log" if numbers else None
