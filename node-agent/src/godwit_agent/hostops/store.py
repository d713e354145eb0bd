"""What a target holds of one migration (``TargetStore``), and the tmpfs under it (``Stores``)."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from godwit_agent.hostops import filerecords
from godwit_agent.hostops.criu.gate import Gate
from godwit_agent.hostops.criu.pagedaemon import PageDaemon
from godwit_agent.hostops.filerecords import Kind
from godwit_agent.hostops.files.filetarget import TargetFiles
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath, Place, PodState, Slot, StoreTotals
from godwit_agent.hostops.pages import charging, hotpages
from godwit_agent.hostops.pages.memory import BOOTSTRAP_TREE
from godwit_agent.hostops.pages.missing import HostMissing
from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.hostops.pages.sharedmemory import SHARED
from godwit_agent.hostops.pages.sharedstore import SharedStore
from godwit_agent.memory import pagemap, tree
from godwit_agent.memory.protobuf import ImageError
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.reasons import Reason

_UID = re.compile(r"[0-9a-f][0-9a-f-]{7,63}\Z")
_CONTAINER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9_.-]{0,127}\Z")
# network: the hook keeps the door, CRIU must not lock; tasks wait for the commit
_OPTIONS = "network-lock skip\nleave-stopped\n"
_IMAGES_BYTES = 1 << 30
_MEMORY_HEADROOM = 1.25


class _Part:
    """One container's share: directories, pages, daemon."""

    def __init__(self, layout: Layout, slot: Slot) -> None:
        self.slot = slot
        self.images = layout.local(slot.images)
        pages = HostPath(f"{slot.directory}/pages")
        self.pages_dir = layout.local(pages)
        self.pages = PageStore(self.pages_dir)
        self.shared = SharedStore(self.images)
        self.daemon = PageDaemon(layout, pages, slot.work)
        self.started_for: bytes | None = None
        self.lock = threading.Lock()

    def link(self, vpid: int) -> None:
        """The daemon finds the memory layout among CRIU's images once they have come."""
        path = self.pages_dir / f"mm-{vpid}.img"
        if not path.is_symlink():
            path.symlink_to(f"{self.slot.images}/mm-{vpid}.img")

    def start(self, processes: bytes) -> None:
        with self.lock:
            if self.started_for == processes:
                return
            (self.pages_dir / "pstree.img").write_bytes(processes)
            (self.pages_dir / "inventory.img").write_bytes(tree.inventory())
            for process in tree.decode(processes):
                self.link(process.pid)
            self.daemon.start()
            self.started_for = processes


class HostTargetStore:
    """The real ``TargetStore``."""

    def __init__(
        self,
        layout: Layout,
        uid: str,
        containers: tuple[str, ...],
        places: tuple[Place, ...] = (),
    ) -> None:
        self._layout = layout
        base = f"{layout.store_dir}/{uid}/target"
        self._base = layout.local(base)
        self._parts = {
            name: _Part(
                layout,
                Slot(
                    container=name,
                    directory=HostPath(f"{base}/{name}"),
                    images=HostPath(f"{base}/{name}/images"),
                    work=HostPath(f"{base}/{name}/work"),
                ),
            )
            for name in containers
        }
        self._files = TargetFiles(layout, {n: f"{base}/{n}/files" for n in containers}, places)
        self._missing: HostMissing | None = None

    def make(self) -> None:
        for part in self._parts.values():
            directory = self._layout.local(part.slot.directory)
            for name in ("images", "work", "pages", "files"):
                (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            (directory / "criu.conf").write_text(_OPTIONS)
            Gate(directory).make()

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self._space(container, vpid).write(vpid, vaddr, data)

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self._space(container, vpid).zero(vpid, vaddr, length)

    def image(self, container: str, name: str, offset: int, total: int, data: memoryview) -> None:
        if not _IMAGE.match(name) or ".." in name:
            raise Rejected(Reason.MALFORMED, f"image name {name!r}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._part(container).images / name, flags, 0o600)
        try:
            if not offset:
                os.ftruncate(fd, total)
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
        finally:
            os.close(fd)

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        part, record = self._part(container), filerecords.decode(header)
        if record.kind is Kind.POPULATED:
            self._space(container, record.number).populated(record.number, record.size, body)
        elif record.kind is Kind.WITHHELD:
            if record.number & SHARED:
                raise Rejected(Reason.MALFORMED, "shared memory cannot be withheld")
            part.pages.withheld(record.number, record.size, body)
        elif record.kind is Kind.SHARED:
            part.shared.announce(record, body)
        else:
            self._files.apply(container, record, body)

    def slots(self) -> Mapping[str, Slot]:
        return {name: part.slot for name, part in self._parts.items()}

    def bind(self, successor: PodState) -> None:
        self._files.bind(successor)

    def charge(self, successor: PodState) -> None:
        place = charging.place_of(self._layout, successor.sandbox)
        for part in self._parts.values() if place else ():
            assert place
            part.shared.charge(place, available_bytes())

    def start_daemons(self) -> None:
        for part in self._parts.values():
            part.shared.listen()
            try:
                processes = (part.images / BOOTSTRAP_TREE).read_bytes()
                part.start(processes)
            except FileNotFoundError:
                continue
            except ImageError as error:
                raise Aborted(Reason.VERIFY_FAILED, f"{BOOTSTRAP_TREE}: {error}") from error

    def complete(self, *, may_miss: bool = False) -> StoreTotals:
        memory = images = count = 0
        begin = time.monotonic_ns()
        for part in self._parts.values():
            try:
                processes = (part.images / "pstree.img").read_bytes()
                for number, process in enumerate(tree.decode(processes)):
                    count += 1
                    memory += self._complete(part, process.pid, number, may_miss=may_miss)
                memory += part.shared.complete_all()
                self._follow(part, processes)
            except (FileNotFoundError, ImageError) as error:
                message = f"container {part.slot.container}: {error}"
                raise Aborted(Reason.VERIFY_FAILED, message) from error
            images += sum(path.stat().st_size for path in part.images.iterdir())
        took = (time.monotonic_ns() - begin) // 1000
        away = sum(part.pages.missing.bytes for part in self._parts.values())
        return StoreTotals(memory, images, count, {"complete": took}, away)

    def missing(self) -> HostMissing | None:
        parts = {n: (p.pages, p.daemon) for n, p in self._parts.items() if p.pages.missing}
        if parts and self._missing is None:
            self._missing = HostMissing(parts)
        return self._missing

    def require_shared(self) -> None:
        for part in self._parts.values():
            part.shared.require_given()

    def destroy(self) -> None:
        if self._missing:
            self._missing.let_go()
        for part in self._parts.values():
            part.daemon.stop()
            part.pages.close()
            part.shared.close()
        self._files.close()
        remove_tree(self._layout, f"{self._layout.store_dir}", self._base)

    def drained(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        return all(
            part.daemon.drained(max(0.0, deadline - time.monotonic()))
            for part in self._parts.values()
        )

    @staticmethod
    def _complete(part: _Part, vpid: int, before: int, *, may_miss: bool) -> int:
        path, layout = part.images / f"pagemap-{vpid}.img", part.images / f"mm-{vpid}.img"
        if not path.exists():
            if layout.exists():
                raise FileNotFoundError(path.name)
            return 0  # a zombie has no memory
        number, entries = pagemap.decode(path.read_bytes())
        part.link(vpid)
        most = hotpages.room(part.images, number, before)
        size, hot = part.pages.complete(vpid, entries, layout.read_bytes(), most, may_miss=may_miss)
        if hot:
            hotpages.bring(
                part.images, vpid, number, entries, hot,
                lambda start, length: part.pages.read(vpid, start, length),
            )  # fmt: skip
        return size

    @staticmethod
    def _follow(part: _Part, processes: bytes) -> None:
        """A daemon that was started for other processes than these is started again."""
        if part.started_for is not None:
            expected = {item.pid for item in tree.decode(part.started_for)}
            if expected == {item.pid for item in tree.decode(processes)}:
                return
        part.start(processes)

    def _space(self, container: str, number: int) -> PageStore:
        """Where the pages of a process lie, or those of an object that several share."""
        part = self._part(container)
        return part.shared if number & SHARED else part.pages

    def _part(self, container: str) -> _Part:
        part = self._parts.get(container)
        if part is None:
            raise Rejected(Reason.MALFORMED, f"container {container!r} is not expected")
        return part


class HostStores:
    """The real ``Stores``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._base = layout.local(layout.store_dir)
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create_source(self, migration_uid: str) -> None:
        self._mount(migration_uid)
        (self._base / migration_uid / "source").mkdir(mode=0o700, exist_ok=True)

    def create_target(
        self,
        migration_uid: str,
        containers: tuple[str, ...],
        memory_bytes: int,
        places: tuple[Place, ...] = (),
    ) -> HostTargetStore:
        if not containers or not all(_CONTAINER.match(name) for name in containers):
            raise Rejected(Reason.MALFORMED, f"container names {containers}")
        available = available_bytes()
        needed = int(memory_bytes * _MEMORY_HEADROOM)
        if needed > available:
            message = f"{needed} bytes are needed, {available} are available on this node"
            raise Rejected(Reason.NOT_ENOUGH_MEMORY, message)
        self._mount(migration_uid)
        former = self.open_target(migration_uid)
        if former is not None:
            former.destroy()
        store = HostTargetStore(self._layout, migration_uid, containers, places)
        store.make()
        return store

    def open_target(self, migration_uid: str) -> HostTargetStore | None:
        path = self._base / _checked(migration_uid) / "target"
        if not path.is_dir():
            return None
        names = tuple(sorted(one.name for one in path.iterdir() if _CONTAINER.match(one.name)))
        return HostTargetStore(self._layout, migration_uid, names)

    def destroy_source(self, migration_uid: str) -> None:
        remove_tree(
            self._layout, self._layout.store_dir, self._base / _checked(migration_uid) / "source"
        )

    def destroy(self, migration_uid: str) -> None:
        former = self.open_target(migration_uid)
        if former is not None:
            former.destroy()
        path = f"{self._layout.store_dir}/{migration_uid}"
        if self._mounted(path):
            self._run("umount", "-l", path)
        local = self._layout.local(path)
        if local.is_dir():
            local.rmdir()

    def list(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self._base.iterdir() if _UID.match(path.name)))

    def _mount(self, migration_uid: str) -> None:
        path = f"{self._layout.store_dir}/{_checked(migration_uid)}"
        self._layout.local(path).mkdir(mode=0o700, exist_ok=True)
        if not self._mounted(path):
            # no limit of its own: sizes are checked against the node's memory before
            options = "mode=0700,size=100%,nosuid,nodev,noexec"
            self._run("mount", "-t", "tmpfs", "-o", options, "godwit", path)

    def _mounted(self, path: str) -> bool:
        return any(point == path for point in mount_points(self._layout))

    def _run(self, *argv: str) -> None:
        done = subprocess.run(
            self._layout.command(*argv),
            capture_output=True,
            text=True,
            env=self._layout.environment(),
            check=False,
        )
        if done.returncode:
            raise Retryable(Reason.INTERNAL, f"{' '.join(argv)}: {done.stderr.strip()}")


def mount_points(layout: Layout) -> list[str]:
    text = Path(f"/proc/{layout.host_pid}/mountinfo").read_bytes().decode(errors="replace")
    return [line.split(" ")[4] for line in text.split("\n") if line]


def remove_tree(layout: Layout, within: str, path: Path) -> None:
    """Removes a directory without entering anything that is mounted below it.

    CRIU binds a container's root below its working directory while it restores;
    following that would empty the container.
    """
    host_path = "/" + str(path.relative_to(layout.root))
    if not host_path.startswith(f"{within}/"):
        raise ValueError(f"{host_path} is not within {within}")
    for point in sorted(mount_points(layout), reverse=True):
        if point.startswith(f"{host_path}/"):
            subprocess.run(
                layout.command("umount", "-l", point),
                capture_output=True,
                env=layout.environment(),
                check=False,
            )
    if path.is_dir():
        subprocess.run(
            layout.command("rm", "-rf", "--one-file-system", "--", host_path),
            capture_output=True,
            env=layout.environment(),
            check=False,
        )


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _checked(migration_uid: str) -> str:
    if not _UID.match(migration_uid):
        raise Rejected(Reason.MALFORMED, f"migration uid {migration_uid!r}")
    return migration_uid
