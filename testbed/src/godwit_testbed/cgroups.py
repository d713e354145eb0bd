"""A node's own cgroup in every hierarchy of the machine (v1, v2 or both)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from godwit_testbed.paths import Place

_ROOT = Path("/sys/fs/cgroup")
# Of a node, where cgroup v2 is alone: a cgroup with controllers for its children has no processes
# of its own (admin-guide/cgroup-v2.rst, No Internal Process Constraint).
_SERVICES = "services"
# The namespace's root is where a process is when it leaves the machine's; then it steps down.
_STEP_DOWN = f"""
mkdir -p "$0/{_SERVICES}"
echo 0 > "$0/{_SERVICES}/cgroup.procs"
for one in $(cat "$0/cgroup.controllers"); do echo "+$one" > "$0/cgroup.subtree_control"; done
exec "$@"
"""


def hierarchies() -> list[tuple[str, str, Path]]:
    """``(type, mount options that select it, mount point)`` of each hierarchy."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.append((kind, "", Path(point)))
        elif kind == "cgroup":
            words = [
                word
                for word in options.split(",")
                if word not in ("rw", "ro", "nosuid", "nodev", "noexec", "relatime", "xattr")
                and not word.startswith(("release_agent", "clone_children"))
            ]
            named = any(word.startswith("name=") for word in words)
            found.append((kind, ",".join((["none"] if named else []) + words), Path(point)))
    unique = {(kind, options): point for kind, options, point in reversed(found)}
    return [(kind, options, point) for (kind, options), point in unique.items()]


def unified() -> bool:
    """Whether cgroup v2 is alone on this machine."""
    return [(kind, point) for kind, _, point in hierarchies()] == [("cgroup2", _ROOT)]


def namespaced(place: Place, node: str, argv: list[str]) -> list[str]:
    """``argv`` in a cgroup namespace whose root is the node's cgroup, for a process that has
    entered it."""
    if not unified():
        return ["unshare", "--cgroup", *argv]
    directory = str(_ROOT / place.cgroup / node)
    return ["unshare", "--cgroup", "sh", "-e", "-c", _STEP_DOWN, directory, *argv]


def create(place: Place, node: str) -> None:
    """Make the node's cgroups, empty; cpuset needs its parents filled in first (cgroup v1)."""
    alone = unified()
    if alone:
        remove(place, node)
    for kind, options, point in hierarchies():
        directory = point / place.cgroup / node
        directory.mkdir(parents=True, exist_ok=True)
        if kind == "cgroup" and "cpuset" in options.split(","):
            for level in (point / place.cgroup, directory):
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (level / file).write_text((level.parent / file).read_text())
        if alone:
            available = (point / "cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{name}" for name in available)
            for level in (point, point / place.cgroup):
                (level / "cgroup.subtree_control").write_text(wanted)


def enter(place: Place, node: str) -> None:
    """Move this process into the node's cgroups, so that what it starts counts there."""
    for _, _, point in hierarchies():
        directory = point / place.cgroup / node
        services = directory / _SERVICES
        with contextlib.suppress(OSError):
            inside = services if services.is_dir() else directory
            (inside / "cgroup.procs").write_text(str(os.getpid()))


def remove(place: Place, node: str = "") -> None:
    """Kill what is left in a testbed's cgroups, or a node's, and remove them, deepest first."""
    for _, _, point in hierarchies():
        top = point / place.cgroup / node
        if not top.is_dir():
            continue
        deadline = time.monotonic() + 20
        while top.is_dir() and time.monotonic() < deadline:
            for directory, _, _ in os.walk(top, topdown=False):
                path = Path(directory)
                with contextlib.suppress(OSError):
                    (path / "freezer.state").write_text("THAWED")
                with contextlib.suppress(OSError):
                    (path / "cgroup.freeze").write_text("0")
                with contextlib.suppress(OSError):
                    for pid in (path / "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), 9)
                with contextlib.suppress(OSError):
                    path.rmdir()
            if top.is_dir():
                time.sleep(0.02)  # the kernel gives no event for the end of a v1 cgroup's tasks
