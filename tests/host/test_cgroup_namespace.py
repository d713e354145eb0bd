"""A container with a cgroup namespace of its own, the rule where cgroup v2 is alone, keeps one: its
cgroup is the root of what it sees, on each node that it comes to."""

from __future__ import annotations

import os

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.model import PodState
from host.lab import BASE, Lab, Node
from host.test_kernel_objects import ask_when_ready, move, start, wrong

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no Python in {BASE}"),
]


def seen(state: PodState, node: Node) -> set[str]:
    """The paths of /proc/PID/cgroup as the container sees them."""
    pid = state.containers[0].init_pid
    inside = ("nsenter", f"--cgroup=/proc/{pid}/ns/cgroup", "cat", f"/proc/{pid}/cgroup")
    return {line.split(":", 2)[2] for line in node.run(*inside).splitlines()}


def test_moves_there_and_back(scene: Lab) -> None:
    scene.cgroup_namespaces = True
    state = start(scene, scene.a, ["pipe", "threads"])
    home = procs.namespace(scene.a.pid, "cgroup")
    assert not wrong(ask_when_ready(scene))
    assert seen(state, scene.a) == {"/"}
    for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
        _, state = move(scene, state, here, there)
        assert seen(state, there) == {"/"}
        assert procs.namespace(state.containers[0].init_pid, "cgroup") != home
        assert not wrong(ask_when_ready(scene))
