"""A shell at the terminal of its container goes on after a move, with its terminal."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from contextlib import closing

import pytest

from godwit_agent.hostops.inspector import HostInspector
from host.lab import BASE, Console, Lab
from host.test_kernel_objects import IP, move
from host.test_mechanisms import Agent
from terminal import read_until, write

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no root in {BASE}"),
]


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_shell_at_its_terminal_goes_on(scene: Lab, shell: str) -> None:
    pod = scene.sandbox(scene.a, IP)
    with closing(Console(scene.a)) as first, closing(Console(scene.b)) as second:
        scene.start(pod, [shell], console=first)
        scene.a.run("ip", "route", "add", f"{IP}/32", "dev", pod.host_interface)
        scene.route(IP, scene.a)
        master = first.receive()
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 132, 0, 0))
        write(master, "stty -echo; PS1='r''dy> '; x=41; sleep 600 &\n")
        write(master, "echo x$x\n")
        read_until(master, "x41\r\n")
        state = Agent(scene.a).pods.find(pod.uid)
        assert HostInspector(scene.a.layout).inspect(state).obstacles == ()
        move(scene, state, scene.a, scene.b, second)
        master = second.receive()
        write(master, "echo $((x+1)) $(stty size) $(tty)\n")
        read_until(master, "42 40 132 /dev/")
        # its answer shows that it is there: a shell (dash, too) may lose a SIGINT before `exec`
        write(master, "cat\nhere\n")
        read_until(master, "here\r\n")
        write(master, "\x03")  # to the foreground job: it is the controlling terminal
        read_until(master, "rdy> ")  # what is typed sooner may go with the interrupted line
        write(master, "echo $? over; kill %1 && echo killed\n")
        read_until(master, "130 over\r\nkilled")
