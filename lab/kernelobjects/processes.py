"""Threads, process trees, identities, limits, and what restricts them."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from .checks import Check, Differs, Unavailable, check, libc, same, system

_PR_SET_NAME, _PR_GET_NAME = 15, 16
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def child(body: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """A process that runs ``body`` with its end of a socket pair."""
    here, there = socket.socketpair()
    here.settimeout(10)
    pid = os.fork()
    if not pid:
        try:
            here.close()
            body(there)
        finally:
            os._exit(1)
    there.close()
    return pid, here


def ask(answer: Callable[[], object]) -> Callable[[socket.socket], None]:
    """Body of a child that answers every byte with what ``answer`` says."""

    def body(peer: socket.socket) -> None:
        while peer.recv(1):
            try:
                said = str(answer())
            except Exception as error:
                said = repr(error)
            peer.sendall(said.encode())

    return body


def said(peer: socket.socket) -> str:
    peer.sendall(b"?")
    return peer.recv(4096).decode()


def field(name: str, task: str = "self") -> str:
    for line in Path(f"/proc/{task}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":", 1)[1].strip()
    return ""


@check
def threads() -> Check:
    locals_ = threading.local()
    gates = [(threading.Semaphore(0), threading.Semaphore(0)) for _ in range(40)]
    seen: dict[int, tuple[int, int]] = {}

    def run(number: int) -> None:
        locals_.number = number
        while True:
            gates[number][0].acquire()
            seen[number] = locals_.number, threading.get_native_id()
            gates[number][1].release()

    for number in range(40):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    former: dict[int, tuple[int, int]] = {}
    while True:
        for go, done in gates:
            go.release()
            if not done.acquire(timeout=10):
                raise Differs("a thread does not answer")
        if former:
            same(seen, former, "thread-local values and ids")
        former = dict(seen)
        same(former[7][0], 7)
        yield


@check
def sessions_and_groups() -> Check:
    """A leader of a session of its own, with a group of its own below it."""

    def leader(peer: socket.socket) -> None:
        os.setsid()
        inner_pid, inner = child(_inner)
        peer.sendall(struct.pack("i", inner_pid))
        while peer.recv(1):
            ids = os.getsid(0), os.getpgid(0), os.getsid(inner_pid), os.getpgid(inner_pid)
            answer = said(inner)
            peer.sendall(f"{ids} {answer}".encode())

    def _inner(peer: socket.socket) -> None:
        os.setpgid(0, 0)
        ask(lambda: (os.getppid(), os.getpgid(0), os.getsid(0)))(peer)

    pid, peer = child(leader)
    (inner,) = struct.unpack("i", peer.recv(4))
    while True:
        yield
        same(said(peer), f"{(pid, pid, pid, inner)} {(pid, inner, pid)}")


@check
def orphan_of_the_first_process() -> Check:
    """A process whose parent has gone belongs to process 1."""

    def parent(peer: socket.socket) -> None:
        child(lambda _: ask(os.getppid)(peer))
        os._exit(0)

    pid, peer = child(parent)
    os.waitpid(pid, 0)
    while True:
        yield
        same(said(peer), "1")


@check
def zombie() -> Check:
    pid = os.fork()
    if not pid:
        os._exit(42)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    while True:
        yield
        same(Path(f"/proc/{pid}/stat").read_text().split()[2], "Z", "state")
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        same(found and found.si_status, 42, "exit code")


@check
def pending_signal_and_handler() -> Check:
    def answer() -> object:
        pending = signal.SIGUSR2 in signal.sigpending()
        return pending, signal.getsignal(signal.SIGHUP), hits

    hits: list[int] = []

    def body(peer: socket.socket) -> None:
        signal.signal(signal.SIGALRM, lambda number, _: hits.append(int(number)))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        os.kill(os.getpid(), signal.SIGUSR2)
        ask(answer)(peer)

    pid, peer = child(body)
    count = 0
    same(said(peer), f"(True, {signal.SIG_IGN!r}, [])")
    while True:
        yield
        os.kill(pid, signal.SIGHUP)
        os.kill(pid, signal.SIGALRM)
        count += 1
        said(peer)
        same(said(peer), f"(True, {signal.SIG_IGN!r}, {[14] * count})")


@check
def pidfd() -> Check:
    pid, peer = child(ask(os.getpid))
    fd = os.pidfd_open(pid)
    while True:
        yield
        same(said(peer), str(pid))
        watch = select.poll()
        watch.register(fd, select.POLLIN)
        same(watch.poll(0), [], "alive")
        signal.pidfd_send_signal(fd, 0)


@check
def identity() -> Check:
    """Owners, groups, capabilities of a process that has given most of them up."""

    def body(peer: socket.socket) -> None:
        os.setgroups([5, 6])
        os.setresgid(1001, 1002, 1002)
        os.setresuid(1001, 1002, 1002)
        os.umask(0o027)
        os.chdir("/tmp")
        ask(_picture)(peer)

    def _picture() -> object:
        names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Umask")
        return {name: field(name) for name in names}, str(Path.cwd()), os.nice(0)

    _, peer = child(body)
    former = said(peer)
    own = {name: field(name) for name in ("CapPrm", "CapEff", "CapBnd", "Seccomp", "NoNewPrivs")}
    while True:
        yield
        same(said(peer), former)
        for name, value in own.items():
            same(field(name), value, name)


@check
def limits_and_priority() -> Check:
    def body(peer: socket.socket) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (333, 444))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(5)
        os.sched_setaffinity(0, {0})
        ask(_picture)(peer)

    def _picture() -> object:
        limits = [resource.getrlimit(r) for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)]
        return limits, os.nice(0), os.sched_getscheduler(0)

    _, peer = child(body)
    former = said(peer)
    while True:
        yield
        same(said(peer), former)


@check
def process_settings() -> Check:
    """prctl: name, death signal, subreaper."""

    def body(peer: socket.socket) -> None:
        libc.prctl(_PR_SET_NAME, b"own-name")
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        ask(_picture)(peer)

    def _picture() -> object:
        name = ctypes.create_string_buffer(16)
        libc.prctl(_PR_GET_NAME, name)
        values = []
        for option in (_PR_GET_PDEATHSIG, _PR_GET_CHILD_SUBREAPER):
            value = ctypes.c_int()
            libc.prctl(option, ctypes.byref(value))
            values.append(value.value)
        return name.value, values

    _, peer = child(body)
    while True:
        yield
        same(said(peer), str((b"own-name", [int(signal.SIGTERM), 1])))


@check
def no_new_privileges() -> Check:
    def body(peer: socket.socket) -> None:
        system(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        ask(lambda: libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))(peer)

    _, peer = child(body)
    while True:
        yield
        same(said(peer), "1")


@check
def security_label() -> Check:
    """What the node's AppArmor or SELinux calls each thread, and how strictly it means it."""

    def labels() -> set[str]:
        found = set()
        for task in Path("/proc/self/task").iterdir():
            try:
                found.add((task / "attr/current").read_text().strip("\0\n"))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            except OSError as error:
                found.add(f"none ({error.strerror})")
        return found

    first = labels()
    while True:
        yield
        same(labels(), first)


@check
def denied_file() -> Check:
    """/data/denied is a name that a profile of the node's may refuse to write."""

    def answer() -> str:
        try:
            Path("/data/denied").write_text("x")
        except OSError as error:
            return os.strerror(error.errno or 0)
        return "written"

    first = answer()
    while True:
        yield
        same(answer(), first)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


@check
def seccomp_filter() -> Check:
    """sethostname (170 on x86-64, 161 on arm64) answers EDOM (33), before and after."""
    number = {"x86_64": 170, "aarch64": 161}[os.uname().machine]
    code = struct.pack(
        "=HBBIHBBIHBBIHBBI",
        *(0x20, 0, 0, 0),  # A = seccomp_data.nr
        *(0x15, 0, 1, number),  # if A != number skip one
        *(0x06, 0, 0, 0x00050000 | 33),  # SECCOMP_RET_ERRNO
        *(0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )

    def body(peer: socket.socket) -> None:
        held = ctypes.create_string_buffer(code, len(code))
        program = _Program(4, ctypes.addressof(held))
        system(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        system(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)), "seccomp")
        ask(_try)(peer)

    def _try() -> object:
        result = libc.sethostname(b"x", 1)
        return result, ctypes.get_errno(), field("Seccomp")

    _, peer = child(body)
    if "OSError" in (first := said(peer)):
        raise Unavailable(first)
    same(first, "(-1, 33, '2')", "at first")
    while True:
        yield
        same(said(peer), "(-1, 33, '2')")


@check
def restartable_sequences() -> Check:
    """glibc registers rseq for every thread; the kernel keeps the CPU number in it."""
    try:
        offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
        size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
    except ValueError as error:
        raise Unavailable("glibc without rseq") from error
    if not size:
        raise Unavailable("rseq is not registered")
    # rseq of this thread lies at its thread pointer (pthread_self on x86-64) + offset
    libc.pthread_self.restype = ctypes.c_void_p
    area = libc.pthread_self() + offset
    while True:
        yield
        cpus = {ctypes.c_uint.from_address(area + 4).value for _ in range(100)}
        same(cpus <= set(range(os.cpu_count() or 1)), True, f"cpu_id {cpus}")
