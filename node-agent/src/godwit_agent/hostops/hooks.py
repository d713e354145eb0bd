"""The files that agent and ``godwit-hook`` share (docs/architecture.md), and the doorbell."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import (
    ONLY_RESTORED,
    Guard,
    HostPath,
    Mark,
    Plan,
    Slot,
    SuccessorNetwork,
)
from godwit_agent.hostops.smallfiles import make_directory, read_json, sync_directory, write_json
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
# The hook rings after every change; looking now and then as well costs nothing and
# covers a ring that was lost because the pipe was full.
_LOOK_SECONDS = 0.5
T = TypeVar("T")


class HookFiles:
    """The real ``Hooks``."""

    def __init__(self, layout: Layout) -> None:
        self._base = layout.local(layout.run_dir)
        # On disk: a node that is restarted has forgotten what it expects, and must not start a
        # successor as any pod.
        self._marks = layout.local(layout.state_dir) / "successors"
        self._rings = 0
        self._bell = threading.Condition()
        make_directory(self._base)
        for name in ("guard", "expect", "restored", "held"):
            make_directory(self._base / name)
        make_directory(self._marks)
        self._doorbell = self._open_doorbell()
        threading.Thread(target=self._listen, name="doorbell", daemon=True).start()

    def _open_doorbell(self) -> int:
        path = self._base / "doorbell"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Read and write, so that it never reaches end of file when a writer closes.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _listen(self) -> None:
        poller = select.poll()
        poller.register(self._doorbell, select.POLLIN)
        while True:
            poller.poll()
            with contextlib.suppress(BlockingIOError):
                os.read(self._doorbell, 4096)
            with self._bell:
                self._rings += 1
                self._bell.notify_all()

    def forget_failpoints(self) -> None:
        """The hook has no setting of its own: it obeys a directory that a test's agent made."""
        shutil.rmtree(self._base / "failpoints", ignore_errors=True)

    def wait(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """Calls ``look`` now and after each ring until it returns something; None in the end."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._bell:
                rings = self._rings
            if (found := look()) is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with self._bell:
                if self._rings == rings:
                    self._bell.wait(min(left, _LOOK_SECONDS))

    # -- guards -------------------------------------------------------------------------------
    @staticmethod
    def _safe(name: str) -> str:
        if not _SAFE.match(name):
            raise Rejected(Reason.MALFORMED, f"{name!r} cannot be a file name")
        return name

    def guard(
        self, container_ids: Iterable[str], migration: str, epoch: int, deadline: int
    ) -> None:
        for container_id in container_ids:
            write_json(
                self._base / "guard" / self._safe(container_id),
                {"migration": migration, "epoch": epoch, "deadline_boot": deadline},
            )

    def unguard(self, container_ids: Iterable[str]) -> None:
        for container_id in container_ids:
            (self._base / "guard" / self._safe(container_id)).unlink(missing_ok=True)
        sync_directory(self._base / "guard")

    def guards(self) -> tuple[Guard, ...]:
        found = []
        for path in sorted((self._base / "guard").iterdir()):
            value = read_json(path)
            if value is not None:
                found.append(
                    Guard(
                        container_id=path.name,
                        migration=str(value["migration"]),
                        epoch=int(value["epoch"]),
                        deadline_boot=int(value.get("deadline_boot", 0)),
                    )
                )
        return tuple(found)

    # -- successors ---------------------------------------------------------------------------
    def expect(
        self,
        pod_uid: str,
        migration: str,
        epoch: int,
        ips: tuple[str, ...],
        slots: Mapping[str, Slot],
        plan: Plan = ONLY_RESTORED,
    ) -> None:
        write_json(self._marks / self._safe(pod_uid), {"migration": migration, "epoch": epoch})
        directory = self._base / "expect" / pod_uid
        make_directory(directory)
        write_json(
            directory / "expect.json",
            {
                "migration": migration,
                "epoch": epoch,
                "ip": ips[0] if ips else "",
                "more_ips": ips[1:],
                "door": True,
                "containers": {
                    name: {
                        "dir": slot.directory,
                        "images": slot.images,
                        "work": slot.work,
                        "post_start": plan.post_start.get(name, ()),
                        "startup": plan.startup.get(name, ()),
                    }
                    for name, slot in slots.items()
                },
                "done": plan.done,
            },
        )

    def unexpect(self, pod_uid: str, *, ran: bool) -> None:
        directory = self._base / "expect" / self._safe(pod_uid)
        if directory.is_dir():
            shutil.rmtree(directory)
        if ran:
            self.unmark(pod_uid)

    def expected(self) -> Mapping[str, str]:
        found = {}
        for path in sorted((self._base / "expect").iterdir()):
            value = read_json(path / "expect.json")
            found[path.name] = str(value["migration"]) if value else ""
        return found

    def marks(self) -> tuple[Mark, ...]:
        found = []
        for path in sorted(self._marks.iterdir()):
            if not path.name.startswith("."):
                value = read_json(path)
                migration = str(value["migration"]) if value else ""
                found.append(Mark(path.name, migration, time.time() - path.stat().st_mtime))
        return tuple(found)

    def unmark(self, pod_uid: str) -> None:
        (self._marks / self._safe(pod_uid)).unlink(missing_ok=True)
        sync_directory(self._marks)

    def network(self, pod_uid: str) -> SuccessorNetwork | None:
        value = read_json(self._base / "expect" / self._safe(pod_uid) / "network.json")
        if value is None:
            return None
        return SuccessorNetwork(
            ip=value["ip"],
            native_ip=value["native_ip"],
            gateway=value["gateway"],
            netns=HostPath(value["netns"]),
            interface=value["interface"],
            host_interface=value["host_interface"],
            sandbox_id=value["sandbox_id"],
            pod_mac=value["pod_mac"],
            host_mac=value["host_mac"],
        )
