"""Processes that must outlive this agent: CRIU in a dump, the page daemon, and the injector.

A runtime that ends the agent's container kills what is in its cgroup, so these
go to a cgroup of their own. Killing CRIU in the middle of a dump would leave
its code inside the processes it dumps; the injector, registers that are not
theirs.
"""

from __future__ import annotations

import contextlib

from godwit_agent.hostops.layout import Layout

_CGROUP = "godwit-tools"
_MOUNT = "/sys/fs/cgroup"


def detach(layout: Layout, pid: int) -> None:
    """Out of the agent's cgroup in every hierarchy; best effort, as a test may lack some."""
    base = layout.local(_MOUNT)
    unified = (base / "cgroup.controllers").exists()
    for hierarchy in (base,) if unified else sorted(base.iterdir()):
        if hierarchy.is_symlink() or not (hierarchy / "cgroup.procs").exists():
            continue
        path = hierarchy / _CGROUP
        with contextlib.suppress(OSError):
            path.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if not unified and (path / name).exists():
                    (path / name).write_text((hierarchy / name).read_text())
            (path / "cgroup.procs").write_text(str(pid))
