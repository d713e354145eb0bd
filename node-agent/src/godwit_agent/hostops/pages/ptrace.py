"""A few system calls inside another process, without its knowledge. x86_64 only.

The thread is seized and interrupted, so it is stopped on its way to user space,
possibly out of a system call. With all registers put back, the kernel restarts
that call as it would have after a stop (orig_rax stays; arch/x86/kernel/signal.c,
arch_do_signal_or_restart). Signals wait meanwhile (PTRACE_SETSIGMASK), seccomp
is suspended (PTRACE_O_SUSPEND_SECCOMP), and a thread caught inside a
restartable sequence goes to that sequence's abort handler, as after any
preemption (see rseq(2)). The stop takes well below a millisecond.

The tracer is a thread: everything here must run in one, and if that thread
ends, the kernel lets the process go as it is. Hence ``injector``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import time
from types import TracebackType

from godwit_agent.hostops import procs

_SEIZE, _INTERRUPT, _CONT, _DETACH, _STEP = 0x4206, 0x4207, 7, 17, 9  # linux/ptrace.h
_GETREGS, _SETREGS, _GETSIGMASK, _SETSIGMASK = 12, 13, 0x420A, 0x420B
_GET_RSEQ = 0x420F
_SUSPEND_SECCOMP = 1 << 21
_EVENT_STOP = 128
_WALL = 0x40000000
_SIGTRAP = 5
_USER_64_CS = 0x33
_SYSCALL = b"\x0f\x05"
_STOP_TIMEOUT_S = 1.0
_ALL_SIGNALS = 2**64 - 1
_U64 = 2**64 - 1

# order of struct user_regs_struct (asm/user_64.h)
# fmt: off
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base",
    "ds", "es", "fs", "gs",
)
# fmt: on
_INDEX = {name: index for index, name in enumerate(_REGISTERS)}
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_RSEQ_CONFIGURATION = struct.Struct("<QIIII")
_RSEQ_SECTION = struct.Struct("<IIQQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class InjectionError(Exception):
    """The process cannot be used this way; nothing in it was changed."""


def supported() -> bool:
    return platform.machine() == "x86_64"


class Tracee:
    """Context in which ``syscall`` may be called; the process stands still as long as it lasts."""

    def __init__(self, pid: int) -> None:
        if not supported():
            raise InjectionError(f"system calls cannot be injected on {platform.machine()}")
        self._pid = pid
        self._gadget = _find_syscall(pid)
        self._registers = (ctypes.c_ulong * len(_REGISTERS))()
        self._saved: list[int] = []
        self._mask = ctypes.c_uint64()

    def __enter__(self) -> Tracee:
        try:
            self._request(_SEIZE, 0, _SUSPEND_SECCOMP)
        except OSError as error:
            raise InjectionError(f"process {self._pid} is already traced: {error}") from error
        self._request(_INTERRUPT)
        self._wait_for_stop()
        try:
            self._save()
        except BaseException:
            self._request(_DETACH)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._write(self._saved)
            self._request(_SETSIGMASK, 8, ctypes.addressof(self._mask))
            self._request(_DETACH)
        except OSError as gone:
            if gone.errno != errno.ESRCH:
                raise

    def syscall(self, number: int, *arguments: int) -> int:
        """Result of the system call; ``OSError`` with its errno."""
        values = list(self._saved)
        values[_INDEX["rax"]] = number
        values[_INDEX["orig_rax"]] = _U64
        values[_INDEX["rip"]] = self._gadget
        for name, value in zip(_ARGUMENTS, arguments, strict=False):
            values[_INDEX[name]] = value & _U64
        self._write(values)
        self._request(_STEP)
        _, state = os.waitpid(self._pid, _WALL)
        if not os.WIFSTOPPED(state) or os.WSTOPSIG(state) != _SIGTRAP:
            raise InjectionError(f"process {self._pid} did not come back: {state:#x}")
        result = ctypes.c_long(self._read()[_INDEX["rax"]]).value
        if -4096 < result < 0:
            raise OSError(-result, f"system call {number}: {os.strerror(-result)}")
        return result

    def _save(self) -> None:
        saved = self._read()
        if saved[_INDEX["cs"]] != _USER_64_CS:
            raise InjectionError(f"process {self._pid} runs 32-bit code")
        saved[_INDEX["rip"]] = self._outside_rseq(saved[_INDEX["rip"]])
        self._saved = saved
        self._request(_GETSIGMASK, 8, ctypes.addressof(self._mask))
        full = ctypes.c_uint64(_ALL_SIGNALS)
        self._request(_SETSIGMASK, 8, ctypes.addressof(full))

    def _wait_for_stop(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while True:
            pid, state = os.waitpid(self._pid, _WALL | os.WNOHANG)
            if not pid:
                if time.monotonic() > deadline:
                    raise InjectionError(f"process {self._pid} does not stop")
                time.sleep(0.00005)
                continue
            if not os.WIFSTOPPED(state):
                raise InjectionError(f"process {self._pid} has ended")
            if state >> 16 == _EVENT_STOP:
                return
            self._request(_CONT, 0, os.WSTOPSIG(state))  # a signal on its way: let it through

    def _outside_rseq(self, ip: int) -> int:
        """``ip``, or the abort handler when ``ip`` is inside a restartable sequence."""
        raw = ctypes.create_string_buffer(_RSEQ_CONFIGURATION.size)
        try:
            self._request(_GET_RSEQ, _RSEQ_CONFIGURATION.size, ctypes.addressof(raw))
        except OSError:
            return ip  # a kernel without rseq, or before 5.13
        area = _RSEQ_CONFIGURATION.unpack(raw.raw)[0]
        if not area:
            return ip
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            section = int.from_bytes(os.pread(memory.fileno(), 8, area + 8), "little")
            if not section:
                return ip
            data = os.pread(memory.fileno(), _RSEQ_SECTION.size, section)
        _, _, start, length, abort = _RSEQ_SECTION.unpack(data)
        return int(abort) if start <= ip < start + length else ip

    def _read(self) -> list[int]:
        self._request(_GETREGS, 0, ctypes.addressof(self._registers))
        return list(self._registers)

    def _write(self, values: list[int]) -> None:
        for index, value in enumerate(values):
            self._registers[index] = value
        self._request(_SETREGS, 0, ctypes.addressof(self._registers))

    def _request(self, request: int, address: int = 0, data: int = 0) -> None:
        ctypes.set_errno(0)
        if _libc.ptrace(request, self._pid, address, data) == -1 and ctypes.get_errno():
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace {request:#x} of {self._pid}: {os.strerror(number)}")


def _find_syscall(pid: int) -> int:
    """Address of a ``syscall`` instruction; the vDSO has one."""
    executable = [item for item in procs.mappings(pid) if "x" in item.permissions]
    executable.sort(key=lambda item: item.name != "[vdso]")
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for item in executable:
                if item.name == "[vsyscall]":
                    continue
                length = min(item.end - item.start, 1 << 20)
                at = os.pread(memory.fileno(), length, item.start).find(_SYSCALL)
                if at >= 0:
                    return item.start + at
    except OSError as error:
        raise InjectionError(f"process {pid}: {error}") from error
    raise InjectionError(f"process {pid} has no system call instruction")
