"""One container of an archive, as the container tools write and read checkpoints.

checkpointctl(1), ``podman container restore --import`` and CRI-O agree on a tar with
``config.dump``, ``spec.dump``, ``checkpoint/`` (CRIU's images), ``rootfs-diff.tar`` and
``deleted.files``. Ours keeps memory apart from CRIU's page files, because most of it
was copied before the freeze; here both are joined to the page files that CRIU itself
would have written: ``pages-<n>.img`` with every page, in the order of ``pagemap-<pid>.img``.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from godwit_agent.archive import contents, trees
from godwit_agent.archive.contents import Content, container_of
from godwit_agent.archive.sealed import Input
from godwit_agent.archive.trees import Tree
from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import LOG, UPPER, Kind
from godwit_agent.memory import mappings, pagemap
from godwit_agent.memory.pagemap import PE_LAZY, PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE
from godwit_agent.memory.protobuf import ImageError
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

_PAGES = re.compile(r"godwit/pages/([0-9]{1,10})\.(json|img)\Z")
_MAP = re.compile(r"pagemap-([0-9]{1,10})\.img\Z")
_PAGE_FILE = re.compile(r"pages-([0-9]{1,10})\.img\Z")
_MM = re.compile(r"mm-([0-9]{1,10})\.img\Z")
_SHM = "/dev/shm"  # noqa: S108 - a mount destination, not a file of ours
_PIECE = 1 << 20
Range = tuple[int, int]
Read = Callable[[int], bytes]


def export(file: Input, key: bytes, container: str, tar: tarfile.TarFile) -> dict[str, Any]:
    """Writes all of one container to ``tar``; the manifest. ``Rejected`` as for a restore, and
    ``Malformed`` for a container that the archive does not have: what has been written counts
    only when this returns."""
    with tempfile.TemporaryDirectory(prefix="godwit-export-") as scratch:
        exporter = _Exporter(container, tar, Path(scratch))
        try:
            manifest = contents.read(file, key, exporter)
            known = contents.containers_of(manifest)
            if container not in known:
                message = f"the archive has no container {container!r}, but {', '.join(known)}"
                raise Rejected(Reason.MALFORMED, message)
            exporter.finish(manifest)
        finally:
            exporter.close()
    return manifest


class _Exporter:
    """A ``contents.Visitor``."""

    def __init__(self, container: str, tar: tarfile.TarFile, scratch: Path) -> None:
        self._container = container
        self._tar = tar
        self._scratch = scratch
        directory = tarfile.TarInfo("checkpoint")  # checkpointctl looks for it
        directory.type, directory.mode = tarfile.DIRTYPE, 0o700
        tar.addfile(directory)
        self._config: dict[str, Any] = {}
        self._maps: dict[int, bytes] = {}  # by process
        self._mms: dict[int, bytes] = {}
        self._eager: dict[int, Path] = {}  # CRIU's own pages, by number of the page file
        self._ranges: dict[int, tuple[list[Range], list[Range]]] = {}
        self._trees: dict[str, Tree] = {}

    def take(self, name: str, size: int, content: Content) -> None:
        container, name = container_of(name)
        if container not in ("", self._container):
            return
        pages = _PAGES.match(name)
        if name == "config.dump":
            self._config = json.loads(content.read(size))
        elif name == "spec.dump":
            self._add(name, content.read(size))
        elif name.startswith(contents.IMAGES):
            self._image(name.removeprefix(contents.IMAGES), size, content)
        elif pages and pages[2] == "json":
            ranges = json.loads(content.read(size))
            self._ranges[int(pages[1])] = (_ranges(ranges["data"]), _ranges(ranges["zero"]))
        elif pages:
            self._process(int(pages[1]), content.read)
        elif name == contents.FILES:
            self._files(content)

    def finish(self, manifest: dict[str, Any]) -> None:
        """What needs all that came before."""
        for vpid in sorted(self._maps):  # without memory of ours
            self._ranges.setdefault(vpid, ([], []))
            self._process(vpid, lambda _: b"")
        for number, shared in sorted(self._eager.items()):  # of memory that processes share
            self._file(f"checkpoint/pages-{number}.img", shared)
        config = config_dump(self._config, self._container, manifest)
        self._add("config.dump", json.dumps(config).encode())
        upper = self._trees.get(UPPER)
        if upper:
            self._file("rootfs-diff.tar", trees.as_tar(upper, self._scratch / "tar"))
            self._add("deleted.files", json.dumps(list(trees.removed_names(upper))).encode())
        for name, tree in sorted(self._trees.items()):
            if name in (LOG, UPPER) or not tree:
                continue
            short = name.removeprefix("subPath of ").strip("/").replace("/", "-")
            path = "devshm-checkpoint.tar" if name == _SHM else f"volumes/{short}.tar"
            self._file(path, trees.as_tar(tree, self._scratch / "tar"))

    def close(self) -> None:
        for tree in self._trees.values():
            tree.close()

    def _image(self, name: str, size: int, content: Content) -> None:
        if found := _MAP.match(name):
            self._maps[int(found[1])] = content.read(size)
        elif found := _PAGE_FILE.match(name):
            path = self._eager[int(found[1])] = self._scratch / name
            with path.open("wb") as file:
                while data := content.read(_PIECE):
                    file.write(data)
        else:
            data = content.read(size)
            if found := _MM.match(name):
                self._mms[int(found[1])] = data
            self._add(f"checkpoint/{name}", data)

    def _process(self, vpid: int, read: Read) -> None:
        """Joins CRIU's pages and ours; both come in the order of addresses."""
        data, zero = self._ranges.pop(vpid)
        try:
            number, entries = pagemap.decode(self._maps.pop(vpid))
            layout = self._mms[vpid]
            served = pagemap.to_serve(entries, sorted([*data, *zero]), mappings.droppable(layout))
        except (KeyError, ImageError) as error:
            message = f"the images of process {vpid} are missing or cannot be read: {error}"
            raise Rejected(Reason.ARCHIVE_DAMAGED, message) from error
        rows = sorted(
            [
                *((e.vaddr, e.end, True) for e in entries if not e.flags & PE_LAZY),
                *((start, end, False) for start, end in served),
            ]
        )
        plain = [Entry(start, (end - start) // PAGE, PE_PRESENT) for start, end, _ in rows]
        self._add(f"checkpoint/pagemap-{vpid}.img", pagemap.encode(number, plain))
        ours = _Pages(vpid, data, zero, read)
        size = sum(entry.pages * PAGE for entry in plain)
        info = _info(f"checkpoint/pages-{number}.img", size)
        with self._eager.pop(number, Path(os.devnull)).open("rb") as eager:
            source = _Stream(_joined(rows, eager, ours))
            self._tar.addfile(info, cast(IO[bytes], source))

    def _files(self, content: Content) -> None:
        for header, body in contents.records(content):
            record = filerecords.decode(header)
            if record.kind is not Kind.POPULATED:
                tree = self._trees.get(record.tree)
                if tree is None:
                    scratch = self._scratch / f"tree-{len(self._trees)}"
                    tree = self._trees[record.tree] = Tree(scratch)
                tree.apply(record, body)

    def _add(self, name: str, data: bytes) -> None:
        self._tar.addfile(_info(name, len(data)), io.BytesIO(data))

    def _file(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            self._tar.addfile(_info(name, path.stat().st_size), file)


class _Pages:
    """Memory of one process as the archive has it, read once and in order."""

    def __init__(self, vpid: int, data: list[Range], zero: list[Range], read: Read) -> None:
        self._vpid = vpid
        self._data, self._zero = iter(data), iter(sorted(zero))
        self._read = read
        self._now: Range | None = next(self._data, None)
        self._empty: Range | None = next(self._zero, None)

    def take(self, start: int, end: int) -> Iterator[bytes]:
        """The pages of a range, which lies behind those that were asked for before."""
        at = start
        while at < end:
            while self._now and self._now[1] <= at:
                self._skip(self._now[1])
            while self._empty and self._empty[1] <= at:
                self._empty = next(self._zero, None)
            if self._now and self._now[0] <= at:
                self._skip(at)
                length = min(end, self._now[1]) - at
                yield from self._some(length)
                at += length
                self._now = (at, self._now[1])
            elif self._empty and self._empty[0] <= at:
                length = min(end, self._empty[1]) - at
                yield from (bytes(min(_PIECE, length - i)) for i in range(0, length, _PIECE))
                at += length
            else:
                message = f"process {self._vpid}: the page at {at:#x} is missing"
                raise Rejected(Reason.ARCHIVE_DAMAGED, message)

    def _skip(self, to: int) -> None:
        assert self._now
        for _ in self._some(to - self._now[0]):
            pass
        self._now = (to, self._now[1]) if to < self._now[1] else next(self._data, None)

    def _some(self, length: int) -> Iterator[bytes]:
        for at in range(0, length, _PIECE):
            yield self._read(min(_PIECE, length - at))


def _joined(
    rows: Iterable[tuple[int, int, bool]], eager: IO[bytes], ours: _Pages
) -> Iterator[bytes]:
    for start, end, of_criu in rows:
        if of_criu:
            for at in range(start, end, _PIECE):
                yield eager.read(min(_PIECE, end - at))
        else:
            yield from ours.take(start, end)


class _Stream:
    """A file over an iterator, as ``TarFile.addfile`` reads it."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._rest = b""

    def read(self, size: int) -> bytes:
        found = []
        while size:
            if not self._rest:
                self._rest = next(self._parts, b"")
                if not self._rest:
                    break
            part, self._rest = self._rest[:size], self._rest[size:]
            found.append(part)
            size -= len(part)
        return b"".join(found)


def config_dump(config: dict[str, Any], container: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """``config.dump`` (checkpointctl's ContainerConfig) with what the Pod object knows. Pure."""
    pod = manifest.get("manifest") or {}
    both = ("containers", "initContainers")
    spec = [one for kind in both for one in (pod.get("spec") or {}).get(kind) or []]
    statuses = [
        one
        for kind in ("containerStatuses", "initContainerStatuses")
        for one in (pod.get("status") or {}).get(kind) or []
    ]
    image = next((one.get("image", "") for one in spec if one["name"] == container), "")
    status: dict[str, Any] = next((one for one in statuses if one["name"] == container), {})
    running = (status.get("state") or {}).get("running") or {}
    checkpointed = datetime.fromtimestamp(manifest["created"], UTC).isoformat()
    return {
        **config,
        "rootfsImageName": image,
        "rootfsImageRef": status.get("imageID", ""),
        "createdTime": running.get("startedAt") or checkpointed,
        "checkpointedTime": checkpointed,
    }


def _ranges(pairs: list[list[int]]) -> list[Range]:
    return [(start, end) for start, end in pairs]


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info
