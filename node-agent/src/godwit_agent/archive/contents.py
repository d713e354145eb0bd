"""What lies in an archive: a tar, with a directory for each container of the pod.

Below ``containers/<name>/``:

=================================  ================================================
``config.dump``, ``spec.dump``      what the container is, and its OCI configuration
``checkpoint/``                     CRIU's images
``godwit/pages/<vpid>.json``        ranges of memory: ``data`` in this order in
                                   ``<vpid>.img``, ``zero``
``godwit/pages/<vpid>.img``         the pages themselves
``godwit/files``                    records of the file copy, in order
=================================  ================================================

Beside it ``godwit/pod.json``, and last ``godwit/manifest.json``: what, when, with
what, and the SHA-256 of every other entry. An archive without its manifest, or
with an entry more or less, is incomplete. Format 1 had one container only, whose
entries lay at the top; it is still read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

from godwit_agent.archive.sealed import Input, Output, SealedReader, SealedWriter
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

MANIFEST = "godwit/manifest.json"
POD = "godwit/pod.json"
FILES = "godwit/files"
IMAGES = "checkpoint/"
_PAGES = re.compile(r"godwit/pages/([0-9]{1,10})\.(json|img)\Z")
_OF_CONTAINER = re.compile(r"containers/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/(.+)\Z")
_RECORD = struct.Struct(">II")
_MAX_HEADER, _MAX_BODY = 64 << 10, 8 << 20
_MAX_MANIFEST = 16 << 20
_PIECE = 1 << 20
Ranges = tuple[tuple[int, int], ...]


class Sink(Protocol):
    """Where the content of an archive goes (``app.arriving.StoreSink``)."""

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None: ...
    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None: ...
    def image(
        self, container: str, name: str, offset: int, total: int, data: memoryview
    ) -> None: ...
    def file(self, container: str, header: bytes, body: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One file to be written; ``content`` gives exactly ``size`` bytes."""

    name: str
    size: int
    content: Iterable[bytes]


class Content(Protocol):
    """One entry while it is being read."""

    def read(self, size: int) -> bytes: ...


class Visitor(Protocol):
    """Who is shown the entries of an archive, in order; what it leaves unread is skipped."""

    def take(self, name: str, size: int, content: Content) -> None: ...


def whole(name: str, data: bytes) -> Entry:
    return Entry(name, len(data), (data,))


def of_container(container: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same entries where those of this container belong."""
    for entry in entries:
        yield Entry(f"containers/{container}/{entry.name}", entry.size, entry.content)


def container_of(name: str) -> tuple[str, str]:
    """(container, name of its entry); no container in an archive of format 1, and for what is
    the pod's."""
    found = _OF_CONTAINER.match(name)
    return (found[1], found[2]) if found else ("", name)


def record(header: bytes, body: bytes | bytearray | memoryview) -> bytes:
    """One record of ``godwit/files``."""
    return _RECORD.pack(len(header), len(body)) + header + bytes(body)


def write(file: Output, key: bytes, entries: Iterable[Entry], manifest: dict[str, Any]) -> int:
    """Writes a complete archive; the number of bytes before encryption."""
    sealed = SealedWriter(file, key)
    digests: dict[str, str] = {}
    total = 0
    with tarfile.open(fileobj=cast(BinaryIO, sealed), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            source = _Source(entry.content)
            tar.addfile(_info(entry.name, entry.size), cast(BinaryIO, source))
            digests[entry.name] = source.digest.hexdigest()
            total += entry.size
        text = json.dumps({**manifest, "sha256": digests}, indent=1).encode()
        tar.addfile(_info(MANIFEST, len(text)), io.BytesIO(text))
    sealed.finish()
    return total + len(text)


def verify(file: Input, key: bytes) -> dict[str, Any]:
    """Reads all of it, keeps nothing; the manifest. ``Rejected`` for anything that is not right."""
    return read(file, key, None)


def load(file: Input, key: bytes, containers: tuple[str, ...], sink: Sink) -> dict[str, Any]:
    """The same, and gives everything to ``sink``; ``containers`` as the manifest names them."""
    return read(file, key, _Loader(containers, sink))


def containers_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Names of all containers in the archive."""
    return tuple(manifest["containers"] if "containers" in manifest else [manifest["container"]])


def read(file: Input, key: bytes, visitor: Visitor | None) -> dict[str, Any]:
    """Shows every entry but the manifest, which it returns, to ``visitor``."""
    sealed = SealedReader(file, key)
    digests: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    try:
        with tarfile.open(fileobj=cast(BinaryIO, sealed), mode="r|") as tar:
            for info in tar:
                content = tar.extractfile(info) if info.isreg() else None
                if content is None or manifest is not None or info.name in digests:
                    raise _incomplete(f"{info.name} does not belong into it")
                if info.name == MANIFEST:
                    if info.size > _MAX_MANIFEST:
                        raise _incomplete("its manifest is too large")
                    manifest = json.loads(content.read())
                    continue
                hashing = _Hashing(cast(BinaryIO, content))
                if visitor is not None:
                    visitor.take(info.name, info.size, hashing)
                while hashing.read(_PIECE):
                    pass
                digests[info.name] = hashing.digest.hexdigest()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _incomplete(str(error)) from error
    while sealed.read(_PIECE):  # to the verified end
        pass
    if not isinstance(manifest, dict) or manifest.get("sha256") != digests:
        raise _incomplete("its manifest is missing or lists other entries")
    return manifest


def _incomplete(what: str) -> Rejected:
    return Rejected(Reason.ARCHIVE_DAMAGED, f"the archive is incomplete: {what}")


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info


class _Source:
    """A file over an iterable, as ``TarFile.addfile`` reads it."""

    def __init__(self, content: Iterable[bytes]) -> None:
        self._content = iter(content)
        self._rest = b""
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            if not self._rest:
                self._rest = next(self._content, b"")
                if not self._rest:
                    break
            part, self._rest = self._rest[:size], self._rest[size:]
            self.digest.update(part)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class _Hashing:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


class _Loader:
    """Takes entries apart again. What it is given is authentic, so faults are ours."""

    def __init__(self, containers: tuple[str, ...], sink: Sink) -> None:
        self._containers = containers
        self._sink = sink
        self._ranges: dict[tuple[str, int], Ranges] = {}

    def take(self, name: str, size: int, content: Content) -> None:
        container, name = container_of(name)
        container = container or self._containers[0]
        pages = _PAGES.match(name)
        if name.startswith(IMAGES):
            self._image(container, name.removeprefix(IMAGES), size, content)
        elif name == FILES:
            for header, body in records(content):
                self._sink.file(container, header, memoryview(body))
        elif pages and pages[2] == "json":
            ranges = json.loads(content.read(size))
            self._layout(container, int(pages[1]), ranges)
        elif pages:
            self._pages(container, int(pages[1]), content)

    def _image(self, container: str, name: str, size: int, content: Content) -> None:
        for at in range(0, max(size, 1), _PIECE):
            data = content.read(min(_PIECE, size - at))
            self._sink.image(container, name, at, size, memoryview(data))

    def _layout(self, container: str, vpid: int, ranges: dict[str, list[list[int]]]) -> None:
        self._ranges[container, vpid] = tuple((start, end) for start, end in ranges["data"])
        for start, end in ranges["zero"]:
            self._sink.zero(container, vpid, start, end - start)

    def _pages(self, container: str, vpid: int, content: Content) -> None:
        for start, end in self._ranges[container, vpid]:
            for at in range(start, end, _PIECE):
                data = content.read(min(_PIECE, end - at))
                self._sink.pages(container, vpid, at, memoryview(data))


def records(content: Content) -> Iterator[tuple[bytes, bytes]]:
    """(header, body) of each record of ``godwit/files``; ``ValueError`` when they are cut."""
    while prefix := content.read(_RECORD.size):
        if len(prefix) < _RECORD.size:
            raise ValueError("a file record is cut")
        header, body = _RECORD.unpack(prefix)
        if header > _MAX_HEADER or body > _MAX_BODY:
            raise ValueError("a file record is too large")
        yield content.read(header), content.read(body)


def page_entries(
    vpid: int, data: Ranges, zero: Ranges, read: Iterator[bytes]
) -> tuple[Entry, Entry]:
    """The two entries of one process's memory; ``read`` gives the pages of ``data`` in order."""
    text = json.dumps({"data": data, "zero": zero}).encode()
    size = sum(end - start for start, end in data)
    return (
        whole(f"godwit/pages/{vpid}.json", text),
        Entry(f"godwit/pages/{vpid}.img", size, read),
    )
