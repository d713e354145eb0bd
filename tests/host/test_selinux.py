"""Debian's CRIU knows nothing of SELinux: a container with a label of its own is refused, one that
has the runtime's moves and keeps it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.inspector import HostInspector
from godwit_api.errors import Aborted
from godwit_api.reasons import Reason
from host.lab import BASE, HERE, Lab
from host.test_kernel_objects import ask_when_ready, move, start

LABEL = "system_u:system_r:container_t:s0:c0,c1"
SELINUX = Path("/sys/fs/selinux")
CHECKS = ["pipe", "threads", "security_label"]

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not (BASE / "usr/bin/python3").exists(), reason=f"no Python in {BASE}"),
    pytest.mark.skipif(not (SELINUX / "load").exists(), reason="no SELinux in this kernel"),
]


@pytest.fixture(autouse=True, scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The machine's own, or where it has none (the kernel says so with its initial label) one
    that denies nothing: it stays until the next boot, nothing can take it back."""
    if Path("/proc/self/attr/current").read_text().strip("\0\n") != "kernel":
        return
    compiler = shutil.which("secilc")
    if not compiler:
        pytest.skip("no secilc (package secilc)")
    made = tmp_path_factory.mktemp("policy")
    options = ["-o", str(made / "policy"), "-f", str(made / "contexts")]
    version = (SELINUX / "policyvers").read_text()
    subprocess.run([compiler, "-c", version, *options, HERE / "selinux.cil"], check=True)
    (SELINUX / "load").write_bytes((made / "policy").read_bytes())


def test_a_label_of_the_containers_own_is_refused(scene: Lab) -> None:
    scene.selinux = LABEL
    state = start(scene, scene.a, CHECKS)
    assert procs.security_labels(state.containers[0].init_pid) == {LABEL}
    (found,) = HostInspector(scene.a.layout).inspect(state).obstacles
    assert found.reason is Reason.SECURITY_LABEL
    assert LABEL in found.message


def test_the_runtimes_label_stays(scene: Lab) -> None:
    state = start(scene, scene.a, CHECKS)
    label = procs.security_labels(os.getpid())
    for here, there in ((scene.a, scene.b), (scene.b, scene.a)):
        assert procs.security_labels(state.containers[0].init_pid) == label
        assert HostInspector(here.layout).inspect(state).obstacles == ()
        assert set(ask_when_ready(scene).values()) == {"ok"}
        _, state = move(scene, state, here, there)
    assert procs.security_labels(state.containers[0].init_pid) == label
    assert set(ask_when_ready(scene).values()) == {"ok"}


def test_a_runtime_that_would_give_the_copy_a_label(scene: Lab) -> None:
    """Its processes would not have it: nothing is restored."""
    state = start(scene, scene.a, CHECKS)
    assert set(ask_when_ready(scene).values()) == {"ok"}
    scene.selinux = LABEL
    with pytest.raises(Aborted, match=LABEL):
        move(scene, state, scene.a, scene.b)
