"""A node in a directory, with a containerd that reads its files, and an API server of one node."""

from __future__ import annotations

import copy
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from godwit_agent.install.host import Host
from godwit_agent.install.kube import Api

IMPORTS = 'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
CONFLIST = {
    "cniVersion": "1.0.0",
    "name": "podnet",
    "plugins": [
        {"type": "ptp", "ipam": {"type": "host-local", "dataDir": "/var/lib/cni/networks"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
DUMP = """
version = 3
imports = []
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = {selinux}
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']
  conf_dir = '/etc/cni/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '{runc}'
  SystemdCgroup = true
"""
DUMPED_HANDLER = """
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.godwit]
  runtime_type = 'io.containerd.runc.v2'
"""
RESTART = "restart-it now"


class FakeNode(Host):
    """Programs of the node are methods here; what was run is in ``ran``.

    ``running`` is whether containerd's process has the handler, which changes
    with a restart only.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root=root)
        self.ran: list[str] = []
        self.version = "containerd github.com/containerd/containerd/v2 2.1.9"
        self.runc = ""
        self.imports = True
        self.disturbs = False  # a drop-in makes containerd forget other settings
        self.restart_works = True
        self.comes_back = True
        self.running = False
        self.criu_says = (0, "")
        self.tables: list[str] = []
        for name in ("usr/bin/containerd", "usr/sbin/runc"):
            self._program(name)
        for name in (
            "etc/containerd",
            "etc/cni/net.d",
            "opt/cni/bin",
            "proc/sys/fs",
            "run",
            "var/lib",
        ):
            (root / name).mkdir(parents=True)
        (root / "etc/containerd/config.toml").write_text(IMPORTS)
        (root / "etc/cni/net.d/10-podnet.conflist").write_text(json.dumps(CONFLIST))
        (root / "proc/sys/fs/pipe-max-size").write_text("1048576")
        (root / "proc/sys/fs/pipe-user-pages-soft").write_text("16384")

    def _program(self, name: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o755)

    def files(self) -> set[str]:
        """Every file, link and empty directory of the node."""
        return {
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if not path.is_dir() or not any(path.iterdir())
        }

    def restarts(self) -> int:
        return self.ran.count(RESTART)

    def _handler_configured(self) -> bool:
        return self.imports and self.path("/etc/containerd/conf.d/godwit.toml").exists()

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.ran.append(line)
        code, out = 0, ""
        if line.endswith("containerd --version"):
            out = self.version
        elif line.endswith("config dump"):
            there = self._handler_configured()
            selinux = "true" if there and self.disturbs else "false"
            out = DUMP.format(runc=self.runc, selinux=selinux) + (DUMPED_HANDLER if there else "")
        elif line.endswith("criu check"):
            code, out = self.criu_says
        elif line == RESTART:
            if self.restart_works:
                self.running = self._handler_configured() and self.comes_back
            else:
                code = 1
        elif line.endswith("nft list tables"):
            out = "".join(f"table {name}\n" for name in self.tables)
        elif not (line.startswith("umount") or "route flush" in line or "nft delete" in line):
            raise AssertionError(f"unexpected program: {line}")
        return subprocess.CompletedProcess(argv, code, out, out if code else "")

    def knows_handler(self, containerd: str, handler: str) -> bool:
        return self.running

    def drop_in(self) -> dict[str, Any]:
        return tomllib.loads(self.path("/etc/containerd/conf.d/godwit.toml").read_text())


def payload(directory: Path) -> Path:
    """What the image carries."""
    for name in ("bin/godwit-hook", "criu/criu", "criu/lib/libc.so.6", "criu/bin/tar"):
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        file.chmod(0o755)
    return directory


class FakeApi(Api):
    """Records writes; ``objects`` answers reads by path."""

    def __init__(self, objects: dict[str, Any] | None = None) -> None:
        self.objects = objects or {}
        self.calls: list[tuple[str, str, Any]] = []

    def call(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> Any:
        if method != "GET":
            self.calls.append((method, path, copy.deepcopy(body)))
            return {}
        return self.objects[path]

    def bodies(self, method: str, ending: str) -> list[Any]:
        return [body for verb, path, body in self.calls if verb == method and path.endswith(ending)]
