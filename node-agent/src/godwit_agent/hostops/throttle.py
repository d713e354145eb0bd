"""A container's CPU time, limited for the copy and given back (``Throttles``).

cgroup v2's ``cpu.max`` ("quota period", µs), v1's ``cpu.cfs_quota_us`` (-1: none)
with ``cpu.cfs_period_us``; the kernel refuses a quota below 1 ms
(Documentation/admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst). What was there
before is kept in a file, so that a later process of the agent can give it back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from godwit_agent.hostops.cgroups import guard_paths
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container
from godwit_agent.hostops.smallfiles import make_directory, read_json, write_json
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

_V2, _V1, _V1_PERIOD = "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"
_MIN_QUOTA_US = 1000
_USAGE = re.compile(r"^usage_usec (\d+)$", re.MULTILINE)


class HostThrottles:
    """The real ``Throttles``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._directory = layout.local(f"{layout.run_dir}/throttle")
        make_directory(self._directory)

    def used_seconds(self, container: Container) -> float:
        for home in container.cgroups.values():
            path = self._layout.local(home)
            with contextlib.suppress(OSError, ValueError):
                return int((path / "cpuacct.usage").read_text()) / 1e9
            with contextlib.suppress(OSError):
                match = _USAGE.search((path / "cpu.stat").read_text())
                if match:
                    return int(match[1]) / 1e6
        return 0.0

    def limit(self, container: Container, cpus: float) -> None:
        note = self._note(container.id)
        kept: dict[str, str] = dict(read_json(note) or {})
        try:
            for home, guard in self._files(container):
                now = self._layout.local(home).read_text().strip()
                before = kept.setdefault(home, now)
                kept.setdefault(guard, before)
                write_json(note, kept)  # first: whatever happens now can be undone
                lowered = _lowered(before, self._period(home), cpus)
                self._layout.local(home).write_text(lowered)
        except OSError as error:
            message = f"container {container.name} cannot be slowed down: {error}"
            raise Retryable(Reason.COPY_FAILED, message) from error

    def lift(self, container: Container) -> None:
        self._lift(self._note(container.id))

    def lift_all(self) -> None:
        for note in sorted(self._directory.glob("*.json")):
            self._lift(note)

    def _lift(self, note: Path) -> None:
        for path, before in dict(read_json(note) or {}).items():
            # a cgroup that has gone needs nothing back
            with contextlib.suppress(OSError):
                self._layout.local(path).write_text(before)
        note.unlink(missing_ok=True)

    def _note(self, container_id: str) -> Path:
        return self._directory / f"{container_id}.json"

    def _files(self, container: Container) -> Iterator[tuple[str, str]]:
        """The file that limits, in the container's cgroup and in that of its guard."""
        guards = guard_paths(container)
        for controller, home in container.cgroups.items():
            for name in (_V2, _V1):
                if self._layout.local(f"{home}/{name}").exists():
                    yield f"{home}/{name}", f"{guards[controller]}/{name}"

    def _period(self, path: str) -> int:
        if not path.endswith(_V1):
            return 0
        return int(self._layout.local(f"{path.removesuffix(_V1)}{_V1_PERIOD}").read_text())


def _lowered(before: str, v1_period_us: int, cpus: float) -> str:
    """The text to write; a limit that is lower already stays. ``v1_period_us`` 0: v2."""
    quota, _, said = before.partition(" ")
    period = v1_period_us or int(said)
    wanted = max(round(cpus * period), _MIN_QUOTA_US)
    if quota not in ("max", "-1"):
        wanted = min(wanted, int(quota))
    return str(wanted) if v1_period_us else f"{wanted} {period}"
