"""Our drop-in, read by the real containerd: both versions of its configuration file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from godwit_agent.install import node
from godwit_agent.install.host import Host
from godwit_agent.install.runtime_config import drop_in, drop_in_problem, parse_dump

CACHE = Path(os.environ.get("GODWIT_TESTBED_CACHE", "/var/cache/godwit/testbed"))


def find_containerd() -> str | None:
    if found := shutil.which("containerd"):
        return found
    roots = sorted((CACHE / "roots").glob("node-*/usr/bin/containerd"))
    return str(roots[0]) if roots else None


CONTAINERD = find_containerd()
pytestmark = pytest.mark.skipif(
    CONTAINERD is None,
    reason="there is no containerd: `testbed/testbed build` makes a root that has one",
)
MAIN = {
    2: """
version = 2
imports = ["{directory}/conf.d/*.toml"]
[plugins."io.containerd.grpc.v1.cri"]
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "/my/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = true
""",
    3: """
version = 3
imports = ["{directory}/conf.d/*.toml"]
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  conf_dir = "/my/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true
""",
}


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "conf.d").mkdir()
    file = tmp_path / "config.toml"
    file.write_text(MAIN[request.param].format(directory=tmp_path))
    return file


def dump(config: Path) -> str:
    assert CONTAINERD
    return subprocess.run(
        [CONTAINERD, "--config", str(config), "config", "dump"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize(("config", "version"), [(2, 2), (3, 3)], indirect=["config"])
def test_the_drop_in_adds_the_handler_and_nothing_else(config: Path, version: int) -> None:
    before = parse_dump(dump(config))
    assert before.systemd_cgroup
    assert before.cni_conf_dir == "/my/cni"
    file = config.parent / "conf.d/godwit.toml"
    file.write_text(drop_in(before, version))
    after = parse_dump(dump(config))
    assert after.handlers == before.handlers | {"godwit"}
    assert drop_in_problem(before, after, str(file)) is None
    assert "BinaryName = '/opt/godwit/bin/godwit-runc'" in dump(config)


@pytest.mark.parametrize(("config", "version"), [(2, 3), (3, 2)], indirect=["config"])
def test_a_drop_in_of_the_other_version_is_noticed(config: Path, version: int) -> None:
    """Why the versions have to be the same: containerd itself says nothing."""
    before = parse_dump(dump(config))
    file = config.parent / "conf.d/godwit.toml"
    file.write_text(drop_in(before, version))
    assert drop_in_problem(before, parse_dump(dump(config)), str(file))


class RealContainerd(Host):
    """A node in a directory, whose containerd is real but not running."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root, enter=())

    def which(self, program: str) -> str | None:
        return CONTAINERD if program == "containerd" else super().which(program)


@pytest.mark.parametrize("config", [2, 3], indirect=True)
def test_a_node_is_inspected(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "node"
    for name in ("usr/sbin/runc", "my/cni/10.conflist", str(config).lstrip("/")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch(mode=0o755)
    (root / str(config).lstrip("/")).write_text(config.read_text())
    for name in ("run", "opt"):
        (root / name).mkdir()
    plugins = [{"type": "bridge", "ipam": {"type": "host-local"}}]
    (root / "my/cni/10.conflist").write_text(json.dumps({"name": "n", "plugins": plugins}))
    payload = tmp_path / "payload"
    payload.mkdir()
    settings = node.Settings(payload=payload, config=str(config))
    plan, problems = node.inspect(RealContainerd(root), settings)
    assert problems == []
    assert plan
    assert plan.runc == "/usr/sbin/runc"
    assert plan.runtime.systemd_cgroup
