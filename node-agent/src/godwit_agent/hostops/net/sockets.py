"""Sockets of a container: which of them CRIU can take along.

A socket is looked at through a duplicate of it (pidfd_getfd), so that its
family and protocol are the kernel's own answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from godwit_agent.hostops import descriptors
from godwit_agent.hostops.net.netns import NetnsThread

_SO_PROTOCOL, _SO_DOMAIN = 38, 39  # asm-generic/socket.h
_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_NLM_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")
_UNIX_REQUEST = struct.Struct("=BBHIIIII")
_UNIX_REPLY = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Socket:
    """``inode`` is unique on the node."""

    pid: int
    inode: int
    family: int
    kind: int
    protocol: int


def of(pids: Iterable[int]) -> Iterator[Socket]:
    """Every socket of the processes, once."""
    seen: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                yield from _of_process(pid, handle, seen)
            finally:
                os.close(handle)


def unix_peers(netns: str) -> dict[int, int]:
    """Inode of each connected unix socket of the namespace to that of its other end."""
    thread = NetnsThread(netns)
    try:
        return thread.call(_unix_peers)
    finally:
        thread.close()


def _of_process(pid: int, handle: int, seen: set[int]) -> Iterator[Socket]:
    for number, inode in descriptors.sockets(pid):
        if inode in seen:
            continue
        seen.add(inode)
        try:
            fd = descriptors.duplicate(handle, number)
        except OSError:
            continue
        with socket.socket(fileno=fd) as sock:
            family, kind, protocol = (
                sock.getsockopt(socket.SOL_SOCKET, option)
                for option in (_SO_DOMAIN, socket.SO_TYPE, _SO_PROTOCOL)
            )
        yield Socket(pid, inode, family, kind, protocol)


def _unix_peers() -> dict[int, int]:
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0, 0)
    length = _HEADER.size + len(request)
    head = _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_REQUEST_DUMP, 1, 0)
    peers: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        netlink.send(head + request)
        while True:
            data = netlink.recv(1 << 16)
            at = 0
            while at + _HEADER.size <= len(data):
                size, kind, *_ = _HEADER.unpack_from(data, at)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return peers
                _note_peer(data[at + _HEADER.size : at + size], peers)
                at += (size + 3) & ~3


def _note_peer(message: bytes, peers: dict[int, int]) -> None:
    inode = _UNIX_REPLY.unpack_from(message)[4]
    at = _UNIX_REPLY.size
    while at + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _UNIX_DIAG_PEER:
            (peers[inode],) = struct.unpack_from("=I", message, at + _ATTRIBUTE.size)
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
