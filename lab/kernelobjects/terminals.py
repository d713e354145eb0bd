"""Pseudo-terminals that the container has made itself."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios

from .checks import Check, check, same


def _read(fd: int, until: bytes) -> bytes:
    data = b""
    while until not in data:
        if not select.select([fd], [], [], 5)[0]:
            raise TimeoutError(f"no {until!r} in {data!r}")
        data += os.read(fd, 4096)
    return data


@check
def pseudo_terminal_with_a_shell() -> Check:
    """A session with a controlling terminal, as sshd, tmux and script make it."""
    pid, fd = pty.fork()
    if not pid:
        os.execvp("bash", ["bash", "--norc"])
    termios.tcsetwinsize(fd, (33, 101))
    os.write(fd, b"stty -echo; kept=value; echo rea''dy\n")
    _read(fd, b"ready")
    number = 0
    while True:
        yield
        number += 1
        os.write(fd, f"echo $kept {number} do''ne; stty size; echo en''d\n".encode())
        answer = _read(fd, b"end")
        same(f"value {number} done" in answer.decode(), True, repr(answer))
        same(b"33 101" in answer, True, f"size of the window in {answer!r}")
        same(struct.unpack("i", fcntl.ioctl(fd, 0x5429, bytes(4)))[0], pid, "session")
        same(os.tcgetpgrp(fd), pid, "foreground group")


@check
def pseudo_terminal_settings() -> Check:
    master, slave = pty.openpty()
    mode = termios.tcgetattr(slave)
    mode[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    while True:
        yield
        same(termios.tcgetattr(slave)[:4], mode[:4], "settings")
        os.write(slave, b"out")
        same(os.read(master, 10), b"out")
        os.write(master, b"in")
        same(os.read(slave, 10), b"in")


@check
def interrupt_key() -> Check:
    """Control-C on a terminal reaches the foreground process."""
    while True:
        pid, fd = pty.fork()
        if not pid:
            signal.signal(signal.SIGINT, lambda *_: os._exit(7))
            os.write(1, b"waiting")
            while True:
                signal.pause()
        _read(fd, b"waiting")
        yield
        os.write(fd, b"\x03")
        _, status = os.waitpid(pid, 0)
        same(os.waitstatus_to_exitcode(status), 7)
        os.close(fd)
