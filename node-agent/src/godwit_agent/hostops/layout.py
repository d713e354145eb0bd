"""Where things are on a node. Host tests give their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from godwit_agent.hostops.model import HostPath

_RUN_DIR = HostPath("/run/godwit")
_STATE_DIR = HostPath("/var/lib/godwit")
_PRODUCT_DIR = HostPath("/opt/godwit")
_RUNC_ROOT = HostPath("/run/containerd/runc/k8s.io")
_TASKS_DIR = HostPath("/run/containerd/io.containerd.runtime.v2.task/k8s.io")
_HOST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Layout:
    """``host_pid``: a process in the host's mount namespace, seen from here.

    ``host_netns`` is None when the agent itself is in the host's network
    namespace. ``criu_libraries`` is searched by the dynamic linker for CRIU.
    """

    host_pid: int = 1
    host_netns: str | None = None
    run_dir: HostPath = _RUN_DIR
    state_dir: HostPath = _STATE_DIR
    product_dir: HostPath = _PRODUCT_DIR
    runc: str = "runc"
    runc_root: HostPath = _RUNC_ROOT
    tasks_dir: HostPath = _TASKS_DIR
    runtime_handler: str = "godwit"

    @property
    def gate_dir(self) -> HostPath:
        return HostPath(f"{self.product_dir}/gate")

    @property
    def criu(self) -> HostPath:
        return HostPath(f"{self.product_dir}/criu/criu")

    @property
    def store_dir(self) -> HostPath:
        return HostPath(f"{self.run_dir}/store")

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.host_pid}/root")

    def local(self, path: str) -> Path:
        """How the agent opens a path of the host that it made itself (no symbolic links in it)."""
        return self.root / path.lstrip("/")

    def command(self, *argv: str, netns: str | None = None) -> list[str]:
        """``argv`` run as the host would: its mount and cgroup namespaces, and ``netns``."""
        enter = ["nsenter", f"--mount=/proc/{self.host_pid}/ns/mnt"]
        enter.append(f"--cgroup=/proc/{self.host_pid}/ns/cgroup")
        if netns is not None:
            enter.append(f"--net={netns}")
        return [*enter, "--", *argv]

    def environment(self, **more: str) -> dict[str, str]:
        """For host programs: nothing of the agent's own environment."""
        return {"PATH": _HOST_PATH, "LC_ALL": "C", **more}
