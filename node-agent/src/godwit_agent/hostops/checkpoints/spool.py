"""Where a checkpoint's bytes lie until they are packed: beside the dump, in the node's memory.

Fast enough that the freeze does not wait for it; what is secret in it is on no
disk before it has been encrypted.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from godwit_agent.archive import contents
from godwit_agent.archive.contents import Entry
from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import Kind
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container
from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.hostops.ports import Buffer

_PIECE = 1 << 20


class _Part:
    """One container's."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self._directory = directory
        self._lock = threading.Lock()
        self._log = (directory / "files").open("xb")
        self.pages = PageStore(directory)
        self.images: dict[str, bytes] = {}

    def file(self, header: bytes, body: memoryview) -> None:
        record = filerecords.decode(header)
        if record.kind is Kind.POPULATED:
            self.pages.populated(record.number, record.size, body)
        with self._lock:
            self._log.write(contents.record(header, body))

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        self._log.close()
        self.pages.close()

    def entries(self) -> Iterator[Entry]:
        self._log.flush()
        for name in sorted(self.images):
            yield contents.whole(f"{contents.IMAGES}{name}", self.images[name])
        for vpid in self.pages.processes():
            data, zero = self.pages.kept(vpid)
            yield from contents.page_entries(vpid, tuple(data), tuple(zero), self._read(vpid, data))
        path = self._directory / "files"
        yield Entry(contents.FILES, path.stat().st_size, _pieces(path))

    def _read(self, vpid: int, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
        for start, end in ranges:
            for at in range(start, end, _PIECE):
                yield self.pages.read(vpid, at, min(_PIECE, end - at))


class Spool:
    """One pod's; an ``Outlet``, so that a source copies into it as it would to a target."""

    def __init__(self, layout: Layout, uid: str, containers: Iterable[str]) -> None:
        base = layout.local(f"{layout.store_dir}/{uid}/spool")
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(mode=0o700, parents=True)
        self._layout = layout
        self._base = base
        self._parts = {name: _Part(base / name) for name in containers}
        self._lock = threading.Lock()
        self._sent = 0
        self._aborted = False

    @property
    def takes_shared(self) -> bool:
        """An archive has it as CRIU writes it."""
        return False

    @property
    def bytes_sent(self) -> int:
        return self._sent

    @property
    def usable(self) -> bool:
        return not self._aborted

    def limit(self, bytes_per_s: int) -> None:
        """Memory needs none."""

    def hurry(self) -> None:
        """Nothing holds it back."""

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self._require_usable()
        self._parts[container].pages.write(vpid, vaddr, data)
        self._count(len(data))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self._parts[container].pages.zero(vpid, vaddr, length)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self._require_usable()
        self._parts[container].file(header, body)
        self._count(len(body))

    def image(self, container: str, name: str, content: Buffer) -> None:
        self._parts[container].images[name] = bytes(content)
        self._count(len(content))

    def packet(self, at_ns: int, data: Buffer) -> None:
        """Nobody would wait for it."""

    def flush(self) -> None:
        for part in self._parts.values():
            part.flush()

    def sync(self, timeout_s: float = 0.0) -> None:
        self._require_usable()

    def abort(self) -> None:
        """From any thread: what still writes fails now."""
        self._aborted = True

    def close(self) -> None:
        """Nothing of it stays."""
        self._aborted = True
        for part in self._parts.values():
            part.close()
        shutil.rmtree(self._base, ignore_errors=True)

    def entries(self, container: Container) -> Iterator[Entry]:
        """All of one container, for the archive; after the last byte has come."""
        spec = self._layout.local(f"{container.bundle}/config.json").read_bytes()
        yield contents.whole("spec.dump", spec)
        yield from self._parts[container.name].entries()

    def _count(self, length: int) -> None:
        with self._lock:
            self._sent += length

    def _require_usable(self) -> None:
        if self._aborted:
            raise OSError("the checkpoint was given up")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            yield data
