"""Where a checkpoint's bytes lie until they are packed: beside the dump, in the node's memory.

Fast enough that the freeze does not wait for it; what is secret in it is on no
disk before it has been encrypted.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from godwit_agent.archive import contents
from godwit_agent.archive.contents import Entry
from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import Kind
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container
from godwit_agent.hostops.pagestore import PageStore
from godwit_agent.hostops.ports import Buffer

_PIECE = 1 << 20


class Spool:
    """One container's; an ``Outlet``, so that a source copies into it as it would to a target."""

    def __init__(self, layout: Layout, uid: str) -> None:
        base = layout.local(f"{layout.store_dir}/{uid}/spool")
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(mode=0o700, parents=True)
        self._layout = layout
        self._base = base
        self._pages = PageStore(base)
        self._log = (base / "files").open("xb")
        self._lock = threading.Lock()
        self._images: dict[str, bytes] = {}
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
        self._pages.write(vpid, vaddr, data)
        self._sent += len(data)

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self._pages.zero(vpid, vaddr, length)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self._require_usable()
        record = filerecords.decode(header)
        if record.kind is Kind.POPULATED:
            self._pages.populated(record.number, record.size, body)
        with self._lock:
            self._log.write(contents.record(header, body))
            self._sent += len(body)

    def image(self, container: str, name: str, content: Buffer) -> None:
        self._images[name] = bytes(content)
        self._sent += len(content)

    def packet(self, at_ns: int, data: Buffer) -> None:
        """Nobody would wait for it."""

    def flush(self) -> None:
        self._log.flush()

    def sync(self, timeout_s: float = 0.0) -> None:
        self._require_usable()

    def abort(self) -> None:
        """From any thread: what still writes fails now."""
        self._aborted = True

    def close(self) -> None:
        """Nothing of it stays."""
        self._aborted = True
        self._log.close()
        self._pages.close()
        shutil.rmtree(self._base, ignore_errors=True)

    def entries(self, container: Container) -> Iterator[Entry]:
        """All of it, for the archive; after the last byte has come."""
        self._log.flush()
        spec = self._layout.local(f"{container.bundle}/config.json").read_bytes()
        yield contents.whole("spec.dump", spec)
        for name in sorted(self._images):
            yield contents.whole(f"{contents.IMAGES}{name}", self._images[name])
        for vpid in self._pages.processes():
            data, zero = self._pages.kept(vpid)
            yield from contents.page_entries(vpid, tuple(data), tuple(zero), self._read(vpid, data))
        path = self._base / "files"
        yield Entry(contents.FILES, path.stat().st_size, _pieces(path))

    def _read(self, vpid: int, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
        for start, end in ranges:
            for at in range(start, end, _PIECE):
                yield self._pages.read(vpid, at, min(_PIECE, end - at))

    def _require_usable(self) -> None:
        if self._aborted:
            raise OSError("the checkpoint was given up")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            yield data
