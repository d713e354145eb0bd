"""CRIU's dump of a container, started early and held at the gate (``Dumps``).

``runc checkpoint`` works on a *shadow* of runc's state: a copy whose cgroup
paths are those of the guard, so that CRIU looks at the right freezer and runc
leaves the real state to the kubelet. It runs in a network namespace of its own:
CRIU's page server asks nobody who they are, and there nobody else can call.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from godwit_agent.hostops import procs
from godwit_agent.hostops.cgroups import guard_paths
from godwit_agent.hostops.criu import survive, vmaflags
from godwit_agent.hostops.criu.gate import Gate
from godwit_agent.hostops.criu.shadow import write_shadow
from godwit_agent.hostops.files import netfiles, watches
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath
from godwit_agent.hostops.net import repair
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.ports import Hooks
from godwit_agent.memory import openfiles, sizes, timers
from godwit_api.errors import Aborted, Retryable, Unsafe
from godwit_api.reasons import Reason

_PORT = 27000
_FLAGS = "flags"
_SHARED = "shared"
# struct page_server_iov and PS_IOV_* of criu/page-xfer.c, v4.2
_COMMAND = struct.Struct("<I4xQQQ")
_FLUSH_AND_CLOSE, _NONSENSE = 0x1023, 0x63
_OPTIONS = "network-lock skip\nghost-limit 268435456\n"
_ERROR = re.compile(r"^.*\bError \(.*$", re.MULTILINE)
_SPACE = re.compile(r"[\s\"'#]")
_KILL_TIMEOUT_S = 5.0
# CRIU hears us when its dump has come to the page server. On a loaded node that takes its time,
# and there is no other way back: to give up leaves the pod frozen until a person comes.
LET_GO_TIMEOUT_S = 60.0


def directory_of(layout: Layout, migration_uid: str, container_id: str) -> HostPath:
    return HostPath(f"{layout.store_dir}/{migration_uid}/source/{container_id}")


class HostGatedDump:
    """The real ``GatedDump``."""

    def __init__(
        self,
        layout: Layout,
        hooks: Hooks,
        container: Container,
        directory: HostPath,
        *,
        post_copy: bool = False,
    ) -> None:
        self._post_copy = post_copy
        self._hooks = hooks
        self._container = container
        self._path = layout.local(directory)
        self._gate = Gate(self._path)
        self._opened = False
        self._log = self._path / "work" / "dump.log"
        self._netns = NetnsThread(private=True)
        self._status, writer = os.pipe()
        try:
            self._process = self._start(layout, directory, writer)
        except BaseException:
            os.close(self._status)
            self._netns.close()
            raise
        finally:
            os.close(writer)
        (self._path / "pid").write_text(str(self._process.pid))
        survive.detach(layout, self._process.pid)

    def _start(self, layout: Layout, directory: HostPath, writer: int) -> subprocess.Popen[bytes]:
        arguments = layout.command(
            layout.runc,
            *("--root", f"{directory}/runc", "checkpoint"),
            *("--image-path", f"{directory}/images", "--work-path", f"{directory}/work"),
            *("--tcp-established", "--file-locks", "--manage-cgroups-mode", "ignore"),
            *("--lazy-pages", "--page-server", f"127.0.0.1:{_PORT}"),
            *("--status-fd", str(writer), self._container.id),
            netns=self._netns.path,
        )
        environment = layout.environment(
            GODWIT_GATE=directory,
            CRIU_CONFIG_FILE=f"{directory}/criu.conf",
            GODWIT_DIRTY_ONLY="untracked" if self._post_copy else "1",  # criu-shim.c
            GODWIT_FLAGS=f"{directory}/{_FLAGS}",  # criu-vmas.c
            GODWIT_SHARED=f"{directory}/{_SHARED}",  # criu-shared.c
        )
        environment["PATH"] = f"{layout.gate_dir}:{environment['PATH']}"
        with (self._path / "runc.log").open("wb") as log:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # the reading end too: if this agent ends, CRIU's word must not meet a closed pipe
                pass_fds=(writer, self._status),
                start_new_session=True,
            )

    def wait_waiting(self, timeout_s: float) -> None:
        def look() -> bool | None:
            return True if self._gate.waiting() or self._process.poll() is not None else None

        self._hooks.wait(look, timeout_s)
        if not self._gate.waiting() or self._process.poll() is not None:
            raise self._failure("does not come to the gate")
        vmaflags.keep(self._path / _FLAGS, procs.tree(self._container.init_pid))

    def leave_out(self, shared: Iterable[tuple[int, int]]) -> None:
        lines = (f"{device} {inode}\n" for device, inode in shared)
        (self._path / _SHARED).write_text("".join(lines))

    def open_gate(self) -> None:
        self._opened = True
        self._gate.open()

    def wait_dumped(self, timeout_s: float) -> None:
        ready, _, _ = select.select([self._status], [], [], timeout_s)
        if not ready:
            raise Aborted(Reason.FREEZE_TIMEOUT, f"CRIU has not dumped after {timeout_s:g} s")
        if os.read(self._status, 1) != b"\0":
            self._process.wait(_KILL_TIMEOUT_S)
            raise self._failure("CRIU cannot dump")

    def images(self, *, moving: bool) -> Iterator[tuple[str, bytes]]:
        for path in sorted((self._path / "images").iterdir()):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if path.name == openfiles.NAME:
                    content = timers.mend(content)
                    if moving:
                        content = sizes.leave_out(content, self._network_mounts())
                yield path.name, content

    def _network_mounts(self) -> Collection[int]:
        return netfiles.mounts(procs.read(self._container.init_pid, "mountinfo"))

    def reject(self, timeout_s: float = LET_GO_TIMEOUT_S) -> None:
        if not self._opened:
            self.kill()
        else:
            deadline = time.monotonic() + timeout_s
            while self._process.poll() is None:
                if time.monotonic() > deadline:
                    message = f"CRIU does not let go of container {self._container.id}"
                    raise Unsafe(Reason.DUMP_FAILED, message)
                self._netns.call(lambda: say(_NONSENSE))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.05)
        repair.end(procs.tree(self._container.init_pid))
        self._clean()

    def finish(self, timeout_s: float = 30.0) -> None:
        if self._process.poll() is None:
            self._netns.call(lambda: say(_FLUSH_AND_CLOSE))
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._clean()

    def kill(self) -> None:
        """Only before the gate was opened: later CRIU would leave its code in the processes."""
        self._gate.refuse()
        try:
            self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._clean()

    def _clean(self) -> None:
        if self._status >= 0:
            os.close(self._status)
            self._status = -1
            self._netns.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def _failure(self, what: str) -> Aborted:
        text = ""
        with contextlib.suppress(OSError):
            text = "; ".join(_ERROR.findall(self._log.read_text(errors="replace"))[:3])
        if not text:
            with contextlib.suppress(OSError):
                text = (self._path / "runc.log").read_text(errors="replace")[-500:].strip()
        return Aborted(
            Reason.DUMP_FAILED, f"container {self._container.name}: {what}: {text or 'no reason'}"
        )


class HostDumps:
    """The real ``Dumps``."""

    def __init__(self, layout: Layout, hooks: Hooks) -> None:
        self._layout = layout
        self._hooks = hooks

    def prepare(
        self, container: Container, migration_uid: str, *, post_copy: bool = False
    ) -> HostGatedDump:
        directory = directory_of(self._layout, migration_uid, container.id)
        path = self._layout.local(directory)
        shutil.rmtree(path, ignore_errors=True)
        for name in ("images", "work", "runc", _FLAGS):
            (path / name).mkdir(mode=0o700, parents=True)
        (path / "criu.conf").write_text(_OPTIONS + _watched(container))
        Gate(path).make()
        write_shadow(self._layout, container, guard_paths(container), path / "runc")
        return HostGatedDump(self._layout, self._hooks, container, directory, post_copy=post_copy)

    def recover(self, container: Container, migration_uid: str) -> None:
        path = self._path(container, migration_uid)
        Gate(path).refuse()
        self._end(path, _NONSENSE, container)
        repair.end(procs.tree(container.init_pid))
        shutil.rmtree(path, ignore_errors=True)

    def reap(self, container: Container, migration_uid: str) -> None:
        path = self._path(container, migration_uid)
        self._end(path, _FLUSH_AND_CLOSE, container)
        shutil.rmtree(path, ignore_errors=True)

    def _path(self, container: Container, migration_uid: str) -> Path:
        return self._layout.local(directory_of(self._layout, migration_uid, container.id))

    @staticmethod
    def _end(path: Path, command: int, container: Container) -> None:
        """Speaks to a CRIU that a former agent had started, in the namespace it lives in."""
        try:
            pid = int((path / "pid").read_text())
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + LET_GO_TIMEOUT_S
        while container.id in procs.read(pid, "cmdline"):
            if time.monotonic() > deadline:
                message = f"CRIU (process {pid}) does not let go of container {container.id}"
                raise Unsafe(Reason.DUMP_FAILED, message)
            with contextlib.suppress(Retryable):  # it has ended since we looked
                thread = NetnsThread(f"/proc/{pid}/ns/net")
                thread.call(lambda: say(command))
                thread.close()
            time.sleep(0.02)


def _watched(container: Container) -> str:
    """Where CRIU finds what is watched by inotify; by name, as inodes differ on the target."""
    if not container.init_pid:
        return ""
    found = watches.find(container.init_pid, procs.tree(container.init_pid))
    lines = [f"irmap-scan-path {path}\n" for path in found.paths if not _SPACE.search(path)]
    return "force-irmap\n" + "".join(lines) if lines else ""


def say(command: int) -> bool:
    """One word to the page server of this network namespace; whether one listens.

    Everything goes in one packet: a connection that closes before a word has
    been read means success to CRIU, and it would kill the processes.
    """
    try:
        with socket.create_connection(("127.0.0.1", _PORT), timeout=1.0) as sock:
            sock.sendall(_COMMAND.pack(command, 0, 0, 0))
            with contextlib.suppress(OSError):
                sock.recv(8)
    except OSError:
        return False
    return True
