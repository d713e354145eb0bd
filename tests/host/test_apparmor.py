"""A container under an AppArmor profile, as every container is where the node has AppArmor, is
under the same one after a move, and what that denies stays denied."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import apparmor
from godwit_agent.hostops import security
from godwit_agent.hostops.model import PodState, Profiles
from host.lab import BASE, Lab
from host.test_kernel_objects import ask_when_ready, move, start

NAME = "godwit-host-test"
DENIED = "/data/denied"
# Of the kind that container runtimes give: everything but what could reach the node.
PROFILE = f"""
profile {NAME} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (send, receive) peer={NAME},
  ptrace (trace, read, tracedby, readby) peer={NAME},
  deny mount,
  deny /proc/sysrq-trigger rwklx,
  deny /sys/kernel/security/** rwklx,
  deny {DENIED} rwklx,
}}
"""

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no Python in {BASE}"),
    pytest.mark.skipif(apparmor.missing() is not None, reason=str(apparmor.missing())),
    pytest.mark.skipif(apparmor.PARSER is None, reason="no apparmor_parser (package apparmor)"),
]


@pytest.fixture
def profile() -> Iterator[str]:
    assert apparmor.PARSER
    load = [apparmor.PARSER, "--replace", "--skip-cache"]
    subprocess.run(load, input=PROFILE, text=True, check=True)
    yield NAME
    subprocess.run([apparmor.PARSER, "--remove"], input=PROFILE, text=True, check=True)


def require_confined(scene: Lab, state: PodState) -> None:
    """From outside, and by the program's own checks."""
    process = Path(f"/proc/{state.containers[0].init_pid}")
    assert (process / "attr/current").read_text().strip() == f"{NAME} (enforce)"
    assert set(ask_when_ready(scene).values()) == {"ok"}
    assert not (process / "root" / DENIED.lstrip("/")).exists()


def test_a_profile_that_is_not_loaded_is_named(scene: Lab, profile: str) -> None:
    (found,) = security.missing(scene.a.layout, Profiles(apparmor=(profile, "no-such")))
    assert "no-such" in found


def test_the_profile_follows(scene: Lab, profile: str) -> None:
    scene.apparmor = profile
    state = start(scene, scene.a, ["pipe", "threads", "security_label", "denied_file"])
    require_confined(scene, state)
    for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
        _, state = move(scene, state, here, there)
        require_confined(scene, state)
