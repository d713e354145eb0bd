"""Device access on cgroup v2: BPF programs of a cgroup, given to another one as well.

Without its program a cgroup may open every device. The runtime attaches one to
the container's cgroup (OCI runtime specification, devices); the guard cgroup
needs the same. Calls and numbers: bpf(2), linux/bpf.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from pathlib import Path

_SYSCALLS = {"x86_64": 321, "aarch64": 280}  # __NR_bpf
_PROG_ATTACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 8, 13, 16
_CGROUP_DEVICE = 6  # enum bpf_attach_type
_ALLOW_MULTI = 2
_MAX_PROGRAMS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def copy(source: Path, target: Path) -> int:
    """Attaches the programs of ``source`` to ``target`` too; how many. ``OSError``."""
    count = 0
    with contextlib.ExitStack() as stack:
        ours = _directory(stack, target)
        there = set(attached(target))
        for number in attached(source):
            if number in there:
                continue
            program = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
            stack.callback(os.close, program)
            argument = struct.pack("=IIIII", ours, program, _CGROUP_DEVICE, _ALLOW_MULTI, 0)
            _bpf(_PROG_ATTACH, argument)
            count += 1
    return count


def attached(cgroup: Path) -> tuple[int, ...]:
    """Numbers of the device programs of a cgroup itself. ``OSError``."""
    numbers = (ctypes.c_uint32 * _MAX_PROGRAMS)()
    with contextlib.ExitStack() as stack:
        fd = _directory(stack, cgroup)
        argument = ctypes.create_string_buffer(
            struct.pack(
                "=IIIIQII", fd, _CGROUP_DEVICE, 0, 0, ctypes.addressof(numbers), _MAX_PROGRAMS, 0
            ),
            64,
        )
        _call(_PROG_QUERY, argument)
    (count,) = struct.unpack_from("=I", argument.raw, 24)
    return tuple(numbers[:count])


def _directory(stack: contextlib.ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _bpf(command: int, argument: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(argument, 64))


def _call(command: int, argument: ctypes.Array[ctypes.c_char]) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(f"no number of bpf() for {platform.machine()}")
    result = _libc.syscall(number, command, argument, len(argument))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf {command}: {os.strerror(code)}")
    return int(result)
