"""The target's restores (``Restores``): the hook runs them, here they are let go and checked."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from godwit_agent.hostops import procs
from godwit_agent.hostops.criu.gate import Gate
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Restored, Slot
from godwit_agent.hostops.ports import Hooks
from godwit_agent.hostops.smallfiles import read_json
from godwit_agent.memory import tree
from godwit_agent.memory.protobuf import ImageError
from godwit_api.errors import Aborted, Retryable
from godwit_api.reasons import Reason

_STOPPED = {"T"}
_DEAD = {"Z", "X"}
_STOP_S = 1.0
_ERROR = re.compile(r"^.*\bError \(.*$", re.MULTILINE)


class HostRestores:
    """The real ``Restores``."""

    def __init__(self, layout: Layout, hooks: Hooks) -> None:
        self._layout = layout
        self._hooks = hooks

    def wait_waiting(self, slot: Slot, timeout_s: float) -> str:
        directory = self._layout.local(slot.directory)
        gate = Gate(directory)

        def look() -> bool | None:
            waits = gate.waiting() and self._started(directory)
            return True if waits or (directory / "result.json").exists() else None

        if self._hooks.wait(look, timeout_s) is None:
            message = f"container {slot.container} has not come to the gate yet"
            raise Retryable(Reason.TIMED_OUT, message, delay_seconds=0.2)
        if (directory / "result.json").exists():
            said = (read_json(directory / "result.json") or {}).get("error", "")
            what = f"ended before its time: {said}".rstrip(": ")
            raise self._failure(slot, Reason.SUCCESSOR_FAILED, what)
        try:
            return (directory / "claimed").read_text().strip()
        except FileNotFoundError as error:
            message = f"container {slot.container} waits but nobody has claimed it"
            raise Aborted(Reason.SUCCESSOR_FAILED, message) from error

    def _started(self, directory: Path) -> bool:
        """The runtime has taken the container for running. Before that a kubelet that is restarted
        makes it give the container up (its requests are cancelled), without a word to the hook; and
        the process that came then would be nobody's. For a terminal the runtime waits until the
        process is there."""
        if not (directory / "placeholder").exists():
            return True
        try:
            container_id = (directory / "claimed").read_text().strip()
        except FileNotFoundError:
            return False
        return _mark(self._layout, container_id, "started").exists()

    def restore(self, slot: Slot, timeout_s: float) -> Restored:
        directory = self._layout.local(slot.directory)
        try:
            Gate(directory).open()
        except Aborted as error:
            raise self._failure(slot, Reason.RESTORE_FAILED, error.message) from error

        result = self._hooks.wait(lambda: read_json(directory / "result.json"), timeout_s)
        if result is None:
            message = f"container {slot.container}: no result after {timeout_s:g} s"
            raise Aborted(Reason.RESTORE_FAILED, message)
        if result.get("exit_code") != 0:
            raise self._failure(slot, Reason.RESTORE_FAILED, str(result.get("error", "")))
        restored = self._check(slot, str(result["container_id"]), int(result["pid"]))
        if given_up(self._layout, restored.container_id):
            message = (
                f"container {slot.container}: the container runtime has given it up while it was "
                "restored (was containerd or the kubelet restarted, or the pod deleted?)"
            )
            raise Aborted(Reason.RESTORE_FAILED, message)
        return restored

    def resume(self, restored: Iterable[Restored]) -> int:
        containers = tuple(restored)
        # children first: a parent that runs while its child still stands takes it for stopped
        pids = [pid for one in containers for pid in reversed(one.pids)]
        before = time.time_ns()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for one in containers:  # from now on the hook treats it as any other
            _mark(self._layout, one.container_id, "waiting").unlink(missing_ok=True)
        return before

    def find(self, slot: Slot) -> Restored | None:
        result = read_json(self._layout.local(slot.directory) / "result.json")
        if result is None or result.get("exit_code") != 0:
            return None
        pid, container_id = int(result["pid"]), str(result["container_id"])
        pids = procs.tree(pid)
        # the number may have been given to another process since
        ours = container_id and container_id in procs.read(pid, "cgroup")
        if not pids or not ours or procs.is_zombie(pid):
            return None
        return Restored(slot.container, container_id, pid, pids)

    def verify(self, slot: Slot) -> Restored:
        found = self.find(slot)
        if found is None:
            message = f"container {slot.container} has not been restored here"
            raise Aborted(Reason.RESTORE_FAILED, message)
        return self._check(slot, found.container_id, found.init_pid)

    def abort(self, slot: Slot) -> None:
        directory = self._layout.local(slot.directory)
        restored = self.find(slot)
        if restored is None:
            Gate(directory).refuse()
            restored = self.find(slot)
        if restored is not None:
            # the first process of a PID namespace takes all others with it
            with contextlib.suppress(ProcessLookupError):
                os.kill(restored.init_pid, signal.SIGKILL)

    def _check(self, slot: Slot, container_id: str, init_pid: int) -> Restored:
        try:
            image = (self._layout.local(slot.images) / "pstree.img").read_bytes()
            expected = {item.pid for item in tree.decode(image)}
        except (OSError, ImageError) as error:
            raise Aborted(Reason.VERIFY_FAILED, f"pstree.img: {error}") from error
        pids = procs.tree(init_pid)
        there = {procs.vpid(pid) for pid in pids}
        if there != expected:
            message = f"container {slot.container}: processes {there} were restored, not {expected}"
            raise Aborted(Reason.VERIFY_FAILED, message)
        for pid in pids:
            states = _settled(pid)
            if not states or states - _STOPPED - _DEAD:
                message = f"container {slot.container}: process {pid} is not stopped: {states}"
                raise Aborted(Reason.VERIFY_FAILED, message)
        return Restored(slot.container, container_id, init_pid, pids)

    def _failure(self, slot: Slot, reason: Reason, what: str) -> Aborted:
        """With CRIU's own words, which say more than the runtime's."""
        text = ""
        with contextlib.suppress(OSError):
            log = self._layout.local(slot.work) / "restore.log"
            text = "; ".join(_ERROR.findall(log.read_text(errors="replace"))[:3])
        return Aborted(reason, f"container {slot.container}: {what} {text}".strip())


def _mark(layout: Layout, container_id: str, name: str) -> Path:
    """Of a restored container; hooks/internal/state/marks.go."""
    return layout.local(f"{layout.run_dir}/restored/{container_id}.{name}")


def given_up(layout: Layout, container_id: str) -> bool:
    """Whether the runtime has asked a container to end, or containerd has forgotten it and would
    not know of its process: the bundle goes with the task (bundle.Delete, core/runtime/v2). Under
    CRI-O there is none."""
    if _mark(layout, container_id, "killed").exists():
        return True
    tasks = layout.local(layout.tasks_dir)
    return tasks.is_dir() and not (tasks / container_id).exists()


def _settled(pid: int) -> set[str]:
    """States of its threads. CRIU sends SIGSTOP before it lets go (cr-restore.c,
    finalize_restore_detach): a thread that has not had a processor since is shown as running,
    without having run."""
    deadline = time.monotonic() + _STOP_S
    while (states := set(procs.states(pid))) - _STOPPED - _DEAD:
        if time.monotonic() > deadline:
            break
        time.sleep(0.001)
    return states
