"""One node: namespaces over an overlay of the node root, with nodeinit as process 1."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from godwit_testbed import build, cgroups, shell
from godwit_testbed.paths import Place, TestbedError

PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Directories that must not lie on the overlay: overlayfs refuses an overlay as its upper
# directory, and etcd and the kubelet want a plain file system.
PERSISTENT = ("var/lib", "var/log/node", "opt", "etc/cni", "etc/containerd")

_ENTER = """
set -e
cd "$ROOT"
hostname "$NODE"
mount --make-rprivate /
mount -t proc proc proc
mount -t sysfs sysfs sys
profiles=/sys/kernel/security
if [ -w $profiles/apparmor/.replace ]; then mount --rbind $profiles sys/kernel/security; fi
%(cgroups)s
mount --rbind /dev dev
mount --make-rslave dev
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
for d in %(persistent)s; do mkdir -p "$d" "$DATA/$d"; mount --bind "$DATA/$d" "$d"; done
mkdir -p .old run/netns
pivot_root . .old
export PATH=%(path)s
umount -l /.old
rmdir /.old
mount --make-rshared /
exec env -i PATH="$PATH" HOME=/root /usr/local/bin/nodeinit </dev/null \
  >>/var/log/node/nodeinit.log 2>&1
"""


@dataclass
class Service:
    """A process that nodeinit keeps running."""

    name: str
    argv: list[str]
    env: list[str] = field(default_factory=list)


class Node:
    """A node of a testbed, running or not."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.name = name
        self.data = place.data / name
        self._pid_file = place.run / "pids" / name

    # -- life ---------------------------------------------------------------------------------
    def prepare(self, files: dict[str, str | Path], services: list[Service]) -> None:
        """Lay out the overlay; ``files`` maps paths to text, or to a file that is copied."""
        for directory in ("upper", "work", "root", "bind"):
            (self.data / directory).mkdir(parents=True, exist_ok=True)
        root = build.node_root()
        for directory in PERSISTENT:
            target = self.data / "bind" / directory
            target.mkdir(parents=True, exist_ok=True)
            packaged = root / directory
            if directory != "var/lib" and packaged.is_dir() and not any(target.iterdir()):
                shutil.copytree(packaged, target, dirs_exist_ok=True, symlinks=True)
        wanted: dict[str, str | Path] = {
            "/etc/hostname": self.name + "\n",
            "/etc/hosts": f"127.0.0.1 localhost\n127.0.0.1 {self.name}\n",
            "/etc/resolv.conf": "\n",
            "/etc/machine-id": "",
            "/etc/nodeinit.json": json.dumps([vars(service) for service in services]),
            "/usr/local/bin/nodeinit": build.own_binary("nodeinit"),
            **files,
        }
        for path, content in wanted.items():
            self._put(path, content)
        link = self.data / "upper/usr/local/bin/systemctl"
        if not link.is_symlink():
            link.symlink_to("nodeinit")

    def _put(self, path: str, content: str | Path) -> None:
        base = self.data / "upper"
        for directory in PERSISTENT:
            if path.startswith(f"/{directory}/"):
                base = self.data / "bind"
        target = base / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            target.unlink(missing_ok=True)
            shutil.copyfile(content, target)
            target.chmod(0o755)
        else:
            target.write_text(content)
            if target.suffix in (".key", ".conf") or "pki" in path:
                target.chmod(0o600)

    def start(self) -> None:
        """Start the node and return when its process 1 answers."""
        cgroups.create(self.place, self.name)
        root = self.data / "root"
        if not os.path.ismount(root):
            options = (
                f"lowerdir={build.node_root()},upperdir={self.data}/upper,workdir={self.data}/work"
            )
            shell.run("mount", "-t", "overlay", "overlay", "-o", options, root)
        script = _ENTER % {
            "cgroups": _cgroup_mounts(),
            "persistent": " ".join(PERSISTENT),
            "path": PATH,
        }
        apart = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--kill-child"]
        argv = [
            "nsenter",
            f"--net=/run/netns/{self.place.netns(self.name)}",
            "--",
            *cgroups.namespaced(self.place, self.name, [*apart, "sh", "-c", script]),
        ]
        (self.data / "bind/var/log/node").mkdir(parents=True, exist_ok=True)
        log = self.data / "start.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={
                    "PATH": PATH,
                    "ROOT": str(root),
                    "NODE": self.name,
                    "DATA": str(self.data / "bind"),
                },
                start_new_session=True,
                preexec_fn=lambda: cgroups.enter(self.place, self.name),
            )
        self._await_init(process, log)

    def _await_init(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + 20
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise TestbedError(f"node {self.name} did not start: {log.read_text()[-1000:]}")
            with contextlib.suppress(OSError, IndexError):
                pid = int(children.read_text().split()[0])
                if Path(f"/proc/{pid}/comm").read_text().strip() == "nodeinit":
                    self._pid_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._pid_file.write_text(f"{pid} {_start_time(pid)}")
                    return
            time.sleep(0.02)
        raise TestbedError(f"node {self.name} did not start in 20 s; see {log}")

    @property
    def pid(self) -> int | None:
        """Process 1 of the node as the machine sees it; None when it does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid, started = self._pid_file.read_text().split()
            if _start_time(int(pid)) == started:
                return int(pid)
        return None

    def stop(self) -> None:
        """Kill the node's process 1, and the kernel everything with it."""
        pid = self.pid
        if pid is None:
            return
        handle = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            # A process 1 is gone only when its whole namespace is.
            select.select([handle], [], [], 30)
        finally:
            os.close(handle)
        self._pid_file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmount the node's root and delete its files."""
        root = self.data / "root"
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            point = line.split()[1]
            if point == str(root) or point.startswith(f"{root}/"):
                shell.run("umount", "-l", point, check=False)
        shutil.rmtree(self.data, ignore_errors=True)

    # -- use ----------------------------------------------------------------------------------
    def argv(self, *command: str) -> list[str]:
        """Command line that runs in all namespaces of the node."""
        pid = self.pid
        if pid is None:
            raise TestbedError(
                f"node {self.name} of testbed {self.place.name} does not run; "
                f"`testbed up --name {self.place.name}` brings it up"
            )
        return [
            "nsenter",
            "-t",
            str(pid),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-C",
            "--",
            "env",
            "-C",
            "/",
            "-i",
            f"PATH={PATH}",
            "HOME=/root",
            f"TERM={os.environ.get('TERM', 'dumb')}",
            *command,
        ]

    def run(self, *command: str, check: bool = True, stdin_file: Path | None = None) -> str:
        """Run a command in the node and return its output."""
        return shell.run(*self.argv(*command), check=check, stdin_file=stdin_file)


def _start_time(pid: int) -> str:
    """Kernel start time of a process; tells a reused pid from the old one (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def _cgroup_mounts() -> str:
    if cgroups.unified():
        return "mount -t cgroup2 cgroup sys/fs/cgroup"
    found = cgroups.hierarchies()
    lines = ["mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup"]
    for kind, options, point in found:
        if kind == "cgroup2":
            continue  # the hybrid hierarchy carries no controller; the kubelet would be confused
        directory = f"sys/fs/cgroup/{point.name}"
        lines += [f"mkdir {directory}", f"mount -t cgroup -o {options} cgroup {directory}"]
    return "\n".join(lines)
