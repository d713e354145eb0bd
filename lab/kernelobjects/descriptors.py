"""Pipes, events, timers, watches, and sockets within the container."""

from __future__ import annotations

import array
import ctypes
import os
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path

from .checks import Check, Differs, check, libc, same, system

_EMPTY_MASK = 128  # sizeof(sigset_t) in glibc


@check
def pipe_with_data() -> Check:
    reader, writer = os.pipe()
    os.write(writer, b"left in the pipe")
    while True:
        yield
        same(os.read(reader, 100), b"left in the pipe")
        os.write(writer, b"left in the pipe")


@check
def full_pipe_and_blocked_writer() -> Check:
    reader, writer = os.pipe()
    size = 1 << 18
    data = bytes(range(256)) * (size // 256)

    def write() -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(writer, left) :]

    while True:
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        yield
        got = bytearray()
        while len(got) < size:
            got += os.read(reader, size)
        same(bytes(got) == data, True, "content")
        thread.join(5)
        same(thread.is_alive(), False, "writer alive")


@check
def pipe_size_and_flags() -> Check:
    import fcntl

    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 17)
    while True:
        yield
        same(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ), 1 << 17, "size")
        same(bool(fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK), True, "O_NONBLOCK")


@check
def fifo_with_data() -> Check:
    os.mkfifo("/tmp/fifo")
    fd = os.open("/tmp/fifo", os.O_RDWR | os.O_NONBLOCK)
    os.write(fd, b"left in the fifo")
    while True:
        yield
        same(os.read(fd, 100), b"left in the fifo")
        os.write(fd, b"left in the fifo")


@check
def shared_file_offset() -> Check:
    path = Path("/tmp/offset")
    path.write_bytes(bytes(100))
    first = os.open(path, os.O_RDWR | os.O_APPEND)
    second = os.dup(first)
    os.lseek(first, 42, os.SEEK_SET)
    while True:
        yield
        same(os.lseek(second, 0, os.SEEK_CUR), 42, "offset of the duplicate")
        os.lseek(second, 1, os.SEEK_CUR)
        same(os.lseek(first, -1, os.SEEK_CUR), 42, "one offset for both")


@check
def epoll() -> Check:
    reader, writer = os.pipe()
    quiet, _ = os.pipe()
    watch = select.epoll()
    watch.register(reader, select.EPOLLIN | select.EPOLLET)
    watch.register(quiet, select.EPOLLIN)
    while True:
        yield
        same(watch.poll(0), [], "before")
        os.write(writer, b"x")
        same(watch.poll(5), [(reader, select.EPOLLIN)], "after")
        os.read(reader, 1)


@check
def eventfd() -> Check:
    fd = os.eventfd(7)
    while True:
        yield
        same(os.eventfd_read(fd), 7)
        os.eventfd_write(fd, 7)


@check
def timerfd() -> Check:
    clock = time.CLOCK_MONOTONIC
    far = os.timerfd_create(clock)
    os.timerfd_settime(far, initial=3600.0, interval=5.0)
    begin = time.monotonic()
    near = os.timerfd_create(clock)
    os.timerfd_settime(near, initial=0.25, interval=0.25)
    fired, last = 0, begin
    while True:
        yield
        left, interval = os.timerfd_gettime(far)
        gone = time.monotonic() - begin
        same(interval, 5.0, "interval")
        # a timer stands still in the freeze, the clock does so for a part of it
        same(-0.1 < gone + left - 3600 < 5, True, f"{left} s left of 3600 after {gone}")
        # expirations nobody has read count as one after a restore (the kernel reckons them at
        # the read, from the time at which the timer was set)
        fired = struct.unpack("Q", os.read(near, 8))[0]
        now = time.monotonic()
        same(1 <= fired <= (now - last) / 0.25 + 2, True, f"fired {fired} times in {now - last} s")
        begun = time.monotonic()
        os.read(near, 8)
        last = time.monotonic()
        same(last - begun < 1, True, f"next one after {last - begun} s")


@check
def signalfd() -> Check:
    mask = ctypes.create_string_buffer(_EMPTY_MASK)
    libc.sigaddset(mask, signal.SIGUSR1)
    fd = system(libc.signalfd(-1, mask, 0), "signalfd")
    os.kill(os.getpid(), signal.SIGUSR1)
    while True:
        yield
        same(struct.unpack_from("I", os.read(fd, 128))[0], signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)


@check
def queued_real_time_signals() -> Check:
    number = signal.SIGRTMIN + 5
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    for _ in range(3):
        system(libc.sigqueue(os.getpid(), number, 77), "sigqueue")
    while True:
        yield
        for _ in range(3):
            got = signal.sigtimedwait({number}, 0)
            same(got and got.si_signo, number)
        same(signal.sigtimedwait({number}, 0), None, "a fourth")
        for _ in range(3):
            system(libc.sigqueue(os.getpid(), number, 77), "sigqueue")


@check
def inotify() -> Check:
    watched = Path("/tmp/watched")
    watched.mkdir()
    fd = system(libc.inotify_init1(os.O_NONBLOCK), "inotify_init1")
    wd = system(libc.inotify_add_watch(fd, b"/tmp/watched", 0x100), "inotify_add_watch")
    number = 0
    while True:
        yield
        number += 1
        try:
            raise Differs(f"an event that nobody caused: {os.read(fd, 4096)!r}")
        except BlockingIOError:
            pass
        (watched / f"file{number}").touch()
        data = os.read(fd, 4096)
        same(struct.unpack_from("iIII", data)[0], wd, "watch")
        same(data[16:].rstrip(b"\0"), f"file{number}".encode(), "name")


@check
def inotify_on_a_volume() -> Check:
    fd = system(libc.inotify_init1(os.O_NONBLOCK), "inotify_init1")
    Path("/data/watched").mkdir()
    system(libc.inotify_add_watch(fd, b"/data/watched", 0x100), "inotify_add_watch")
    number = 0
    while True:
        yield
        number += 1
        Path(f"/data/watched/watched{number}").touch()
        same(os.read(fd, 4096)[16:].rstrip(b"\0"), f"watched{number}".encode(), "name")


@check
def unix_stream_with_data() -> Check:
    left, right = socket.socketpair()
    left.sendall(b"left in the socket")
    while True:
        yield
        same(right.recv(100), b"left in the socket")
        right.sendall(b"answer")
        same(left.recv(100), b"answer")
        left.sendall(b"left in the socket")


@check
def unix_listener() -> Check:
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/listener")
    Path("/tmp/listener").chmod(0o640)
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/tmp/listener")
    served, _ = server.accept()
    while True:
        yield
        client.sendall(b"old")
        same(served.recv(10), b"old", "connection from before")
        with socket.socket(socket.AF_UNIX) as late:
            late.connect("/tmp/listener")
            other, _ = server.accept()
            late.sendall(b"new")
            same(other.recv(10), b"new", "connection from after")
            other.close()
        same(Path("/tmp/listener").stat().st_mode & 0o777, 0o640, "mode of the name")


@check
def abstract_unix_listener() -> Check:
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0kernelobjects")
    server.listen()
    while True:
        yield
        with socket.socket(socket.AF_UNIX) as late:
            late.connect("\0kernelobjects")
            other, _ = server.accept()
            other.close()


@check
def unix_datagrams() -> Check:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind("/tmp/datagrams")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.connect("/tmp/datagrams")
    client.send(b"one")
    client.send(b"two")
    while True:
        yield
        same((server.recv(10), server.recv(10)), (b"one", b"two"))
        client.send(b"one")
        client.send(b"two")


@check
def descriptor_in_flight() -> Check:
    left, right = socket.socketpair()
    reader, writer = os.pipe()

    def send() -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))]
        left.sendmsg([b"x"], control)

    send()
    while True:
        yield
        _, control, _, _ = right.recvmsg(1, socket.CMSG_SPACE(4))
        (fd,) = struct.unpack("i", control[0][2])
        os.write(writer, b"through")
        same(os.read(fd, 10), b"through")
        os.close(fd)
        send()


@check
def tcp_on_loopback() -> Check:
    server = socket.create_server(("127.0.0.1", 0))
    pairs = []
    for _ in range(50):
        client = socket.create_connection(server.getsockname())
        served, _ = server.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        client.sendall(b"in the queue")
        pairs.append((client, served))
    while True:
        yield
        for client, served in pairs:
            same(served.recv(100), b"in the queue")
            served.sendall(b"back")
            same(client.recv(100), b"back")
            client.sendall(b"in the queue")
            same(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), 1, "TCP_NODELAY")
            same(client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1, "SO_KEEPALIVE")
            same(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 77, "TCP_KEEPIDLE")


@check
def tcp_half_closed() -> Check:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    served, _ = server.accept()
    client.sendall(b"the last word")
    client.shutdown(socket.SHUT_WR)
    begun = False
    while True:
        yield
        if not begun:
            same(served.recv(100), b"the last word")
            same(served.recv(100), b"", "end")
            begun = True
        served.sendall(b"still here")
        same(client.recv(100), b"still here")


@check
def tcp_over_ipv6_loopback() -> Check:
    server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    client = socket.create_connection(server.getsockname()[:2])
    served, _ = server.accept()
    while True:
        yield
        client.sendall(b"six")
        same(served.recv(10), b"six")


@check
def udp_bound_and_connected() -> Check:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    server.settimeout(2)
    while True:
        yield
        client.send(b"datagram")
        same(server.recvfrom(100), (b"datagram", client.getsockname()))
