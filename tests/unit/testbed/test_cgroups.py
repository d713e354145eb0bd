"""Where a node's processes go on a machine with cgroup v2 alone, over ordinary files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from godwit_testbed import cgroups
from godwit_testbed.paths import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [("cgroup2", "", tmp_path)])
    return Place("unit", 1)


def test_a_cgroup_with_controllers_keeps_no_process(place: Place, tmp_path: Path) -> None:
    """Or no controller can be given to what is below it, and the kubelet does not start."""
    cgroups.create(place, "n1")
    node = tmp_path / place.cgroup / "n1"
    (node / "cgroup.controllers").write_text("cpu memory\n")
    cgroups.enter(place, "n1")  # a namespace begins where its first process is
    assert (node / "cgroup.procs").read_text() == str(os.getpid())

    apart, separate, *command = cgroups.namespaced(place, "n1", ["echo", "runs on"])
    assert (apart, separate) == ("unshare", "--cgroup")
    assert subprocess.check_output(command, text=True) == "runs on\n"
    assert (node / "services" / "cgroup.procs").read_text() == "0\n"  # whoever writes it
    assert (node / "cgroup.subtree_control").read_text() == "+memory\n"  # the last of them

    cgroups.enter(place, "n1")  # what is run on a node later
    assert (node / "services" / "cgroup.procs").read_text() == str(os.getpid())


def test_beside_v1_a_node_is_one_cgroup(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [("cgroup", "memory", tmp_path / "memory"), ("cgroup2", "", tmp_path / "unified")]
    monkeypatch.setattr(cgroups, "hierarchies", lambda: both)
    cgroups.create(place, "n1")
    assert cgroups.namespaced(place, "n1", ["true"]) == ["unshare", "--cgroup", "true"]
    cgroups.enter(place, "n1")
    for _, _, point in both:
        assert (point / place.cgroup / "n1" / "cgroup.procs").read_text() == str(os.getpid())
