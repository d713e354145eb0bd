"""People's sessions: a shell or tmux on the terminal of a container goes on after a move."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from e2e.moving import exec_in, start, start_it
from e2e.support import Scene
from lab.software import SHELL, TMUX
from terminal import read_until, write

pytestmark = pytest.mark.support

_TERMINAL = {"stdin": True, "tty": True}
_COUNT = "import sys\nfor n, line in enumerate(sys.stdin): print(n, line.strip(), flush=True)"


@contextlib.contextmanager
def attached(scene: Scene, pod: str) -> Iterator[int]:
    """A person at ``kubectl attach -it``: the master side of their terminal, 40 lines of 132."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 132, 0, 0))
    command = scene.cluster.argv("kubectl", "attach", "-it", pod, "-n", scene.namespace)
    running = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        yield master
    finally:
        running.terminate()
        running.wait(30)
        os.close(master)


def test_a_shell_on_the_containers_terminal_goes_on(scene: Scene) -> None:
    """Variables, window size, a job in the background, and the interrupt key."""
    start_it(scene, SHELL, **_TERMINAL)
    with attached(scene, "server") as keys:
        write(keys, "x=1; sleep 1000 & echo is$x\n")
        read_until(keys, "is1")
    moves = []
    for number, target in enumerate((scene.nodes[1], scene.nodes[0], scene.nodes[1]), 2):
        moves.append(scene.must_succeed("server", target))
        with attached(scene, "server") as keys:
            write(keys, "x=$((x+1)); echo is$x of $(stty size); kill -0 %1 && echo al''ive\n")
            read_until(keys, f"is{number} of 40 132\r\nalive")
            write(keys, "(echo as''leep; exec sleep 1000)\n")
            read_until(keys, "asleep")
            write(keys, "\x03")
            write(keys, "echo ended $?\n")
            read_until(keys, "ended 130")
    logs = scene.cluster.kubectl("logs", "server", "-n", scene.namespace)
    assert "is1" in logs
    assert "is4" in logs
    scene.record(SHELL.row, moves)


def test_tmux_goes_on_with_its_windows(scene: Scene) -> None:
    start_it(scene, TMUX, **_TERMINAL)

    def tmux(*words: str) -> str:
        return exec_in(scene, "server", "tmux", *words)

    def shows(window: str, text: str) -> None:
        end = time.monotonic() + 20
        while text not in (seen := tmux("capture-pane", "-p", "-t", window)):
            assert time.monotonic() < end, seen

    tmux("new-window", "-d", "-n", "two", "bash --norc")
    for window in ("one", "two"):
        tmux("send-keys", "-t", window, f"x=1; echo {window} is$x", "Enter")
        shows(window, f"{window} is1")
    moves = []
    for number, target in enumerate((scene.nodes[1], scene.nodes[0]), 2):
        moves.append(scene.must_succeed("server", target))
        assert tmux("list-windows", "-F", "#W").split() == ["one", "two"]
        for window in ("one", "two"):
            shows(window, f"{window} is{number - 1}")  # what was on the screen
            tmux("send-keys", "-t", window, f"x=$((x+1)); echo {window} is$x", "Enter")
            shows(window, f"{window} is{number}")
        with attached(scene, "server") as keys:
            write(keys, f"echo ke''ys{number}\n")
            read_until(keys, f"keys{number}")
    scene.record(TMUX.row, moves)


def test_standard_input_goes_on(scene: Scene) -> None:
    start(scene, "servers", None, "python3", "-c", _COUNT, stdin=True)

    def say(word: str) -> str:
        command = scene.cluster.argv("kubectl", "attach", "-i", "server", "-n", scene.namespace)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdin
            assert running.stdout
            running.stdin.write(f"{word}\n")
            running.stdin.flush()
            answer = running.stdout.readline()
            running.terminate()
        return answer.strip()

    assert say("a") == "0 a"
    moves = []
    for number, target in enumerate((scene.nodes[1], scene.nodes[0]), 1):
        moves.append(scene.must_succeed("server", target))
        assert say("b") == f"{number} b"
    scene.record("a program that reads its stdin", moves)
