"""What this node is and what it lacks."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from godwit_agent.hostops import security
from godwit_agent.hostops.copies import best_tracking
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import NodeFacts, Obstacle, Profiles
from godwit_agent.hostops.net.addresses import HostAddresses
from godwit_agent.hostops.store import available_bytes
from godwit_api.reasons import Reason

VERSION = "0.1.0"
_TIMEOUT_SECONDS = 20
_CAP_SYS_RESOURCE = 24  # linux/capability.h


class HostProbe:
    """The real ``NodeProbe``; versions and kernel are asked once, prerequisites each time."""

    def __init__(self, layout: Layout, addresses: HostAddresses) -> None:
        self._layout = layout
        self._addresses = addresses
        self._tracking = best_tracking()
        self._versions = self._ask_versions()
        self._cpu = _cpu_features()

    def facts(self) -> NodeFacts:
        return NodeFacts(
            kernel=platform.release(),
            architecture=platform.machine(),
            versions=self._versions,
            cpu_features=self._cpu,
            tracking=self._tracking,
            problems=tuple(self._problems()),
            ip_pools=self._addresses.subnets(),
            memory_available_bytes=available_bytes(),
        )

    def missing(self, profiles: Profiles) -> tuple[str, ...]:
        return security.missing(self._layout, profiles)

    def _ask_versions(self) -> Mapping[str, str]:
        product = self._layout.product_dir
        asked = {
            "criu": (self._layout.criu, "--version"),
            "runc": (self._layout.runc, "--version"),
            "containerd": ("containerd", "--version"),
            "hook": (f"{product}/bin/godwit-hook", "version"),
        }
        found = {"agent": VERSION}
        if modules := security.modules(self._layout):
            found["security module"] = " and ".join(modules)
        for name, argv in asked.items():
            try:
                done = subprocess.run(
                    self._layout.command(*argv),
                    capture_output=True,
                    text=True,
                    env=self._layout.environment(),
                    timeout=_TIMEOUT_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            lines = done.stdout.strip().splitlines()
            if done.returncode == 0 and lines:
                found[name] = lines[0].strip()
        return found

    def _problems(self) -> list[Obstacle]:
        problems = [
            Obstacle(
                Reason.NODE_NOT_PREPARED,
                f"{what} is missing on the node: the installer of its agent says why "
                "(kubectl describe node, condition GodwitReady)",
            )
            for what, path in (
                ("CRIU", self._layout.criu),
                ("the runtime wrapper", f"{self._layout.product_dir}/bin/godwit-runc"),
                ("the CRIU gate", f"{self._layout.gate_dir}/criu"),
            )
            if not os.path.lexists(self._layout.local(path))
        ]
        problems += self._pipe_problems()
        if not self._addresses.subnets():
            problems.append(
                Obstacle(
                    Reason.ADDRESS_NOT_RESERVABLE,
                    "the handler's CNI chain has no host-local address range",
                )
            )
        return problems

    def _pipe_problems(self) -> list[Obstacle]:
        """CRIU's lazy dump puts references to all pages into pipes; without CAP_SYS_RESOURCE
        the kernel counts them (fs/pipe.c, account_pipe_buffers)."""
        capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
        if int(capabilities, 16) >> _CAP_SYS_RESOURCE & 1:
            return []
        try:
            soft = int(self._layout.local("/proc/sys/fs/pipe-user-pages-soft").read_text())
        except (OSError, ValueError):
            return []
        if soft == 0:
            return []
        message = (
            "the agent has no CAP_SYS_RESOURCE here: set fs.pipe-user-pages-soft=0 and "
            "fs.pipe-max-size=16777216 on the node, or memory cannot be dumped"
        )
        return [Obstacle(Reason.NODE_NOT_PREPARED, message)]


def _cpu_features() -> tuple[str, ...]:
    """Flags of the first processor, proc_cpuinfo(5)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()
