"""Guard cgroups: where a pod's processes live while no Pod object protects them.

A kubelet that restarts removes the cgroups of pods it does not know and kills
what is in them. So for the time of the guard the processes live in
``/godwit/<container id>`` of every hierarchy, outside the kubelet's tree.
Works on cgroup v1 (one hierarchy per controller) and v2.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from godwit_agent.hostops import devicefilter
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, Sandbox
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.reasons import Reason

_MOUNT = Path("/sys/fs/cgroup")
_GUARD = "godwit"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
# Limits that go on applying in the guard cgroup; a file that is not there is skipped.
_LIMITS = (
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cpu.shares", "cpu.cfs_period_us",
    "cpu.cfs_quota_us", "pids.max", "memory.max", "memory.swap.max", "cpu.max", "cpu.weight",
)  # fmt: skip
_POLL_SECONDS = 0.0003
_MOVE_S, _MOVE_STEP_S = 2.0, 0.0005


def guard_paths(container: Container | Sandbox) -> dict[str, str]:
    """Controller to guard cgroup, in the form of ``Container.cgroups`` (and runc's state)."""
    _check(container.id)
    return {
        name: str(_MOUNT / _hierarchy(name, path) / _GUARD / container.id)
        for name, path in container.cgroups.items()
    }


def _hierarchy(controller: str, path: str) -> str:
    """Directory of a hierarchy below the mount; "" when v2 is alone there.

    Hybrid machines have v2 beside v1, at "unified" and without controllers.
    """
    if controller == "":
        return "unified" if path.startswith(str(_MOUNT / "unified")) else ""
    return controller.removeprefix("name=")


def _check(container_id: str) -> None:
    if not _ID.match(container_id):
        raise Rejected(Reason.MALFORMED, f"container id {container_id!r}")


class HostCgroups:
    """The real ``Cgroups`` port."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._base = layout.local(str(_MOUNT))

    # -- places -------------------------------------------------------------------------------
    def _hierarchies(self) -> list[Path]:
        """Mount points that can hold a guard cgroup: v2 itself, or each v1 hierarchy."""
        if (self._base / "cgroup.controllers").exists():
            return [self._base]
        return [
            path
            for path in sorted(self._base.iterdir())
            if not path.is_symlink() and (path / "cgroup.procs").exists()
        ]

    def _guards(self, container_id: str) -> Iterator[Path]:
        _check(container_id)
        for hierarchy in self._hierarchies():
            path = hierarchy / _GUARD / container_id
            if path.is_dir():
                yield path

    # -- moving -------------------------------------------------------------------------------
    def guard(self, container: Container | Sandbox) -> None:
        """Moves all processes of ``container`` into its guard cgroups."""
        for controller, home in container.cgroups.items():
            source = self._layout.local(home)
            if not source.is_dir():
                continue
            target = self._layout.local(guard_paths(container)[controller])
            self._make(target, controller, source)
            # a container may have made cgroups below its own
            for directory in (source, *(path for path in source.rglob("*") if path.is_dir())):
                self._move(directory, target)

    def _make(self, target: Path, controller: str, source: Path) -> None:
        top = target.parent
        for path in (top, target):
            path.mkdir(exist_ok=True)
            for file in ("cpuset.cpus", "cpuset.mems"):  # empty in a new v1 cpuset: no task fits
                if controller == "cpuset":
                    (path / file).write_text((path.parent / file).read_text())
        if controller == "":
            with contextlib.suppress(OSError):
                enabled = (self._base / "cgroup.subtree_control").read_text().split()
                (top / "cgroup.subtree_control").write_text(" ".join(f"+{x}" for x in enabled))
            _copy_device_programs(source, target)
        for file in _LIMITS:
            with contextlib.suppress(OSError):
                (target / file).write_text((source / file).read_text())
        if controller == "devices":  # v1 only: a new cgroup allows what its parent allows, all
            with contextlib.suppress(OSError):
                allowed = (source / "devices.list").read_text().splitlines()
                (target / "devices.deny").write_text("a")
                for line in allowed:
                    (target / "devices.allow").write_text(line)

    @staticmethod
    def _move(source: Path, target: Path) -> None:
        """Empties ``source``; forks during the move are caught by looking again.

        What is about to end cannot be moved, and may need a processor to end.
        """
        deadline = time.monotonic() + _MOVE_S
        while pids := _read_pids(source):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (target / "cgroup.procs").write_text(str(pid))
            if time.monotonic() > deadline:
                break
            time.sleep(_MOVE_STEP_S)
        else:
            return
        raise Retryable(
            Reason.INTERNAL, f"{source} does not run empty: its processes fork faster than we move"
        )

    def unguard(self, container: Container | Sandbox) -> None:
        """Moves the processes back where the runtime had put them, thawed."""
        self.thaw([container.id])
        for controller, home in container.cgroups.items():
            guard = self._layout.local(guard_paths(container)[controller])
            if not guard.is_dir():
                continue
            back = self._layout.local(home)
            if back.is_dir():
                self._move(guard, back)
            with contextlib.suppress(OSError):
                guard.rmdir()

    # -- freezing -----------------------------------------------------------------------------
    def _freezers(self, container_ids: Iterable[str]) -> list[Path]:
        found = []
        for container_id in container_ids:
            for path in self._guards(container_id):
                # of a hybrid machine's two freezers CRIU knows the one of v1 only
                unified = path.parent.parent == self._base
                if (path / "freezer.state").exists() or unified:
                    found.append(path)
        return found

    def freeze(self, container_ids: Iterable[str], timeout_s: float) -> int:
        """Freezes; returns CLOCK_REALTIME in ns once nothing runs any more."""
        freezers = self._freezers(container_ids)
        for path in freezers:
            _write_freeze(path, frozen=True)
        deadline = time.monotonic() + timeout_s
        for path in freezers:
            while not _is_frozen(path):
                if time.monotonic() > deadline:
                    raise Aborted(
                        Reason.FREEZE_TIMEOUT,
                        f"cgroup {path.name} is not frozen after {timeout_s:g} s: "
                        "a task of it is in uninterruptible sleep",
                    )
                if (path / "freezer.state").exists():
                    # v1 re-evaluates FREEZING only when it is written or read
                    # (kernel Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst)
                    _write_freeze(path, frozen=True)
                time.sleep(_POLL_SECONDS)
        return time.time_ns()

    def thaw(self, container_ids: Iterable[str]) -> int:
        """Thaws; returns CLOCK_REALTIME in ns right after."""
        for path in self._freezers(container_ids):
            with contextlib.suppress(FileNotFoundError):
                _write_freeze(path, frozen=False)
        return time.time_ns()

    def frozen(self, container_id: str) -> bool:
        """Whether the guard cgroup is frozen."""
        return any(_is_frozen(path) for path in self._freezers([container_id]))

    # -- ending -------------------------------------------------------------------------------
    def pids(self, container_id: str) -> tuple[int, ...]:
        """Process ids in the guard cgroup."""
        found: set[int] = set()
        for path in self._guards(container_id):
            found.update(_read_pids(path))
        return tuple(sorted(found))

    def kill(self, container_ids: Iterable[str], timeout_s: float = 10.0) -> None:
        """SIGKILL to all, thaw so that they can take it, wait for their end, remove."""
        ids = tuple(container_ids)
        deadline = time.monotonic() + timeout_s
        handles: list[int] = []
        try:
            for container_id in ids:
                for pid in self.pids(container_id):
                    with contextlib.suppress(ProcessLookupError):
                        handle = os.pidfd_open(pid)
                        handles.append(handle)
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
            self.thaw(ids)
            waiting = set(handles)
            while waiting and time.monotonic() < deadline:
                ended, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
                waiting.difference_update(ended)
        finally:
            for handle in handles:
                os.close(handle)
        for container_id in ids:
            for path in list(self._guards(container_id)):
                self._remove(path, deadline)

    @staticmethod
    def _remove(path: Path, deadline: float) -> None:
        while path.is_dir():
            try:
                path.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Retryable(
                        Reason.TIMED_OUT, f"{path} still has processes: {_read_pids(path)}"
                    ) from error
                for pid in _read_pids(path):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.005)

    def list(self) -> tuple[str, ...]:
        """Container ids that have a guard cgroup."""
        found: set[str] = set()
        for hierarchy in self._hierarchies():
            top = hierarchy / _GUARD
            if top.is_dir():
                found.update(path.name for path in top.iterdir() if path.is_dir())
        return tuple(sorted(found))


def _copy_device_programs(source: Path, target: Path) -> None:
    try:
        if not devicefilter.attached(source):
            return
    except OSError:
        return  # hybrid, where v1 controls devices, or a kernel without such programs
    try:
        devicefilter.copy(source, target)
    except OSError as error:
        message = f"{target} would allow every device: {error}"
        raise Retryable(Reason.INTERNAL, message) from error


def _read_pids(path: Path) -> list[int]:
    try:
        return [int(word) for word in (path / "cgroup.procs").read_text().split() if word != "0"]
    except OSError:  # the cgroup has gone, or (v2) is threaded or dying
        return []


def _write_freeze(path: Path, *, frozen: bool) -> None:
    if (path / "freezer.state").exists():
        (path / "freezer.state").write_text("FROZEN" if frozen else "THAWED")
    else:
        (path / "cgroup.freeze").write_text("1" if frozen else "0")


def _is_frozen(path: Path) -> bool:
    try:
        if (path / "freezer.state").exists():
            return (path / "freezer.state").read_text().strip() == "FROZEN"
        return "frozen 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False
