"""The process that works inside others, so that nothing happens to them when the agent is killed.

A thread into which a system call is being injected has registers that are not its own until they
are put back. If its tracer ends in between, the kernel lets it go on as it is, and the pod's
process dies of it (``tests/host/test_injector.py``). So the tracer is a small process of its own,
out of reach of whatever ends the agent or its container. It ends when the agent has closed its end
of their socket, and never in the middle.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable

from godwit_agent.hostops import procs
from godwit_agent.hostops.pages import userfault
from godwit_agent.hostops.pages.ptrace import InjectionError

_TAKEN, _FAILED, _ENDS = b"+", b"-", b"!"  # what an answer begins with
_ANSWER_BYTES = 4096
_TIMEOUT_S = 10.0


class Injector(contextlib.AbstractContextManager["Injector"]):
    """The agent's side; the process is there from the first use until ``close``. Not for several
    threads at once."""

    def __init__(self, outlive: Callable[[int], None]) -> None:
        """``outlive`` takes a process by its number out of the agent's cgroup."""
        self._outlive = outlive
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, pid: int) -> int:
        """A userfaultfd of that process, in our hands only. ``InjectionError``."""
        try:
            line = self._line or self._start()
            line.send(str(pid).encode())
            answer, fds, _, _ = socket.recv_fds(line, _ANSWER_BYTES, 1)
        except OSError as error:
            self.close()
            raise InjectionError(f"process {pid}: the injector: {error}") from error
        if answer[:1] == _TAKEN:
            return fds[0]
        if answer[:1] != _FAILED:
            self.close()
        raise InjectionError(answer[1:].decode(errors="replace") or "the injector has ended")

    def close(self) -> None:
        """Never interrupts an injection."""
        line, self._line = self._line, None
        if line:
            line.close()
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TIMEOUT_S)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-m", __name__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,
            )
        self._line = ours
        ours.settimeout(_TIMEOUT_S)
        self._outlive(self._process.pid)
        return ours


def main() -> None:
    """Until the agent has closed its end, or something could not be undone."""
    with socket.socket(fileno=sys.stdin.fileno()) as line:
        while request := line.recv(_ANSWER_BYTES):
            try:
                fd = userfault.take(int(request))
            except (OSError, InjectionError) as error:
                ends = _holds(int(request))
                line.send(((_ENDS if ends else _FAILED) + str(error).encode())[:_ANSWER_BYTES])
                if ends:
                    return
                continue
            try:
                socket.send_fds(line, [_TAKEN], [fd])
            finally:
                os.close(fd)


def _holds(pid: int) -> bool:
    """Whether the process is still traced by this one: only our end lets it go then."""
    try:
        return procs.status(pid)["TracerPid"] == str(os.getpid())
    except (OSError, KeyError):
        return False


if __name__ == "__main__":
    main()
