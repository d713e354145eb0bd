"""An agent killed while it works inside a process: the process must not notice."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.pages.ptrace import InjectionError
from host.lab import injector, needs_tracking

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="ptrace needs root"),
]

# Counts what it has found wrong; says how far it is when asked (a line for each that it reads).
PROGRAM = """
import hashlib, os, select, sys
want, n = hashlib.sha256(b"x" * 999).digest(), 0
while True:
    n += 1
    assert hashlib.sha256(b"x" * 999).digest() == want
    if select.select([0], [], [], 0)[0]:
        if not os.read(0, 1):
            break
        print(n, flush=True)
"""
AGENT = """
import os, sys
from godwit_agent.hostops.pages.injector import Injector
injector = Injector(lambda _: None)
os.close(injector.take(int(sys.argv[1])))
print("ready", flush=True)
while True:
    os.close(injector.take(int(sys.argv[1])))
"""


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def reached(victim: subprocess.Popen[str]) -> int:
    assert victim.stdin
    assert victim.stdout
    victim.stdin.write("?")
    victim.stdin.flush()
    line = victim.stdout.readline()
    assert line, f"the process has ended: {victim.wait()}"
    return int(line)


@needs_tracking
def test_an_agent_killed_at_any_moment_does_no_harm(victim: subprocess.Popen[str]) -> None:
    """Without the injector's own process one in twenty of these kills ends the victim."""
    before = reached(victim)
    descriptors = sorted(procs.descriptors(victim.pid))
    path = os.pathsep.join(sys.path)
    for _ in range(60):
        argv = [sys.executable, "-c", AGENT, str(victim.pid)]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
        ) as agent:
            assert agent.stdout
            assert agent.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(random.uniform(0, 0.01))
            agent.kill()
        after = reached(victim)
        assert after > before
        before = after
    with injector() as last:
        os.close(last.take(victim.pid))
    assert sorted(procs.descriptors(victim.pid)) == descriptors


@needs_tracking
def test_who_has_gone_is_an_error_and_the_next_one_is_served(
    victim: subprocess.Popen[str],
) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    with injector() as one:
        with pytest.raises(InjectionError):
            one.take(gone.pid)
        os.close(one.take(victim.pid))
    reached(victim)
