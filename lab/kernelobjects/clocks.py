"""Clocks that must not jump, timers that must fire on time."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

from .checks import Check, check, libc, same, system

# Far above any freeze, far below the difference between two nodes' boots.
_JUMP_S = 60.0


def _steady(clock: int) -> Check:
    """The clock goes with the wall clock (which nodes share by NTP) and never back.

    It stands still in the freeze; the uptimes of two nodes differ by far more.
    """
    before, wall = time.clock_gettime(clock), time.time()
    while True:
        yield
        now, now_wall = time.clock_gettime(clock), time.time()
        same(now >= before, True, f"went from {before} to {now}")
        drift = abs((now - before) - (now_wall - wall))
        same(drift < 5, True, f"moved {now - before} s in {now_wall - wall} s")
        before, wall = now, now_wall


@check
def clock_monotonic() -> Check:
    yield from _steady(time.CLOCK_MONOTONIC)


@check
def clock_boottime() -> Check:
    yield from _steady(time.CLOCK_BOOTTIME)


@check
def clock_never_goes_back_while_a_thread_watches() -> Check:
    worst = 0.0
    ticks = 0

    def watch() -> None:
        nonlocal worst, ticks
        last = time.monotonic()
        while True:
            time.sleep(0.02)
            now = time.monotonic()
            worst = max(worst, now - last, (last - now) * 1e9)
            last = now
            ticks += 1

    threading.Thread(target=watch, daemon=True).start()
    former = 0
    while True:
        yield
        same(ticks > former, True, "the watching thread lives")
        former = ticks
        same(worst < _JUMP_S, True, f"jump of {worst} s")


@check
def sleep_ends_on_time() -> Check:
    """A thread that sleeps in the kernel across the move wakes when it should, not earlier."""
    late: list[float] = []

    def sleep() -> None:
        while True:
            due = time.monotonic() + 0.7
            time.sleep(0.7)
            late.append(time.monotonic() - due)

    threading.Thread(target=sleep, daemon=True).start()
    time.sleep(1.0)
    while True:
        yield
        same(bool(late), True, "woke")
        same(min(late) >= 0, True, f"woke {min(late)} s too early")
        same(max(late) < 10, True, f"woke {max(late)} s late")


@check
def interval_timer() -> Check:
    """setitimer(ITIMER_REAL) goes on at its interval."""
    hits: list[float] = []
    signal.signal(signal.SIGALRM, lambda *_: hits.append(time.monotonic()))
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
    while True:
        yield
        gone = time.monotonic() - begin
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        same(round(interval, 3), 0.25, "interval")
        same(0 <= left <= 0.26, True, f"{left} s left")
        # signals of one kind merge while the process is frozen: late, never more often
        same(gone / 0.25 * 0.3 <= len(hits) <= gone / 0.25 + 2, True, f"{len(hits)} in {gone} s")


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long),
    )  # fmt: skip


@check
def posix_timer() -> Check:
    timer = ctypes.c_void_p()
    event = (ctypes.c_char * 64)()
    ctypes.c_int.from_buffer(event, 8).value = signal.SIGRTMIN + 6
    system(libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)), "timer_create")
    system(libc.timer_settime(timer, 0, ctypes.byref(_Spec(0, 0, 3600, 0)), None), "timer_settime")
    begin = time.monotonic()
    while True:
        yield
        spec = _Spec()
        system(libc.timer_gettime(timer, ctypes.byref(spec)), "timer_gettime")
        gone = time.monotonic() - begin
        left = spec.value_s + spec.value_ns / 1e9
        # a timer stands still in the freeze, the clock does so for a part of it
        same(-0.1 < gone + left - 3600 < 5, True, f"{left} s left of 3600 after {gone}")


@check
def timerfd_deadline() -> Check:
    """An absolute time, armed again and again as event loops do; it never comes too early."""
    fd = os.timerfd_create(time.CLOCK_MONOTONIC)
    while True:
        due = time.monotonic() + 30
        os.timerfd_settime(fd, flags=os.TFD_TIMER_ABSTIME, initial=due)
        yield
        left = os.timerfd_gettime(fd)[0]
        wanted = due - time.monotonic()
        same(-0.05 < left - wanted < 5, True, f"{left} s left, not {wanted}")


@check
def absolute_deadline() -> Check:
    """A deadline on CLOCK_MONOTONIC taken before the move still lies where it lay."""
    deadline = time.monotonic() + 3600
    wall = time.time() + 3600
    while True:
        yield
        same(abs((deadline - time.monotonic()) - (wall - time.time())) < 5, True, "distance")


@check
def start_time_of_the_process() -> Check:
    """ps and others reckon a process's age from it; it must not lie in the future."""
    ticks = os.sysconf("SC_CLK_TCK")
    while True:
        yield
        with open("/proc/self/stat") as file:
            started = int(file.read().rsplit(")", 1)[1].split()[19]) / ticks
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        same(now - started >= 0, True, f"started at {started}, now {now}")
