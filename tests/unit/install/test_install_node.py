"""Preparing a node and undoing it, on a node that is a directory."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from godwit_agent.hostops import cgroups
from godwit_agent.hostops.criu import survive
from godwit_agent.hostops.net import connections, redirects, routes
from godwit_agent.install import node
from godwit_agent.install.node import InUse, Settings
from unit.install.fake_node import RESTART, FakeNode, payload


@pytest.fixture
def host(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path / "node")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(node, "_RESTART_SECONDS", 0.3)
    return Settings(payload=payload(tmp_path / "payload"), restart=RESTART)


def test_a_node_is_prepared(host: FakeNode, settings: Settings) -> None:
    assert node.install(host, settings) == []
    assert host.path("/opt/godwit/bin/godwit-runc").readlink() == Path("godwit-hook")
    assert host.path("/opt/godwit/gate/criu").resolve() == host.path("/opt/godwit/bin/godwit-hook")
    assert json.loads(host.read("/opt/godwit/etc/hook.json") or "") == {"runtime": "/usr/sbin/runc"}
    assert host.read("/opt/cni/bin/godwit") == "bin/godwit-hook"
    assert os.access(host.path("/opt/cni/bin/godwit"), os.X_OK)
    for private in ("/run/godwit", "/var/lib/godwit"):
        assert stat.S_IMODE(host.path(private).stat().st_mode) == 0o700
    chain = json.loads(host.read("/etc/godwit/cni/net.d/10-godwit.conflist") or "")
    assert [plugin["type"] for plugin in chain["plugins"]] == ["ptp", "portmap", "godwit"]
    assert host.drop_in()["version"] == 3
    assert host.running
    assert host.restarts() == 1


def test_again_changes_nothing_and_does_not_restart(host: FakeNode, settings: Settings) -> None:
    node.install(host, settings)
    before = {path: host.path("/" + path).lstat().st_ino for path in host.files()}
    assert node.install(host, settings) == []
    assert host.restarts() == 1
    hook = "opt/godwit/bin/godwit-hook"
    assert host.path("/" + hook).lstat().st_ino == before[hook]
    assert host.files() == set(before)


def test_a_crash_before_the_restart_is_made_up_for(host: FakeNode, settings: Settings) -> None:
    node.install(host, settings)
    host.running = False
    assert node.install(host, settings) == []
    assert host.restarts() == 2
    assert host.running


def test_check_changes_nothing(host: FakeNode, settings: Settings) -> None:
    before = host.files()
    plan, problems = node.inspect(host, settings)
    assert plan
    assert problems == []
    assert host.files() == before
    assert not host.restarts()


def test_a_new_release_replaces_and_removes_files(host: FakeNode, settings: Settings) -> None:
    node.install(host, settings)
    (settings.payload / "criu/lib/libc.so.6").rename(settings.payload / "criu/lib/libc.so.7")
    (settings.payload / "bin/godwit-hook").write_text("new")
    assert node.install(host, settings) == []
    libraries = {path.name for path in host.path("/opt/godwit/criu/lib").iterdir()}
    assert libraries == {"libc.so.7"}
    assert host.read("/opt/cni/bin/godwit") == "new"


def test_everything_in_the_way_is_said_at_once(host: FakeNode, settings: Settings) -> None:
    host.path("/usr/sbin/runc").unlink()
    host.path("/etc/cni/net.d/10-podnet.conflist").write_text(
        json.dumps({"name": "n", "plugins": [{"type": "calico"}]})
    )
    host.criu_says = (1, "Error (criu/cr-check.c:1): no userfaultfd\nwarn: nothing")
    problems = node.install(host, settings)
    assert [problem.reason for problem in problems] == [
        "NodeNotPrepared",
        "NetworkNotRouted",
        "AddressNotReservable",
        "NodeNotPrepared",
    ]
    assert "userfaultfd" in problems[-1].message
    assert not host.path("/etc/containerd/conf.d").exists()
    assert not host.restarts()


@pytest.mark.parametrize(
    ("version", "words"),
    [("containerd containerd.io 1.7.27 x", "2.0 or later"), ("", "2.0 or later")],
)
def test_an_old_containerd(host: FakeNode, settings: Settings, version: str, words: str) -> None:
    host.version = version
    (problem,) = node.install(host, settings)
    assert words in problem.message


def test_no_containerd(host: FakeNode, settings: Settings) -> None:
    host.path("/usr/bin/containerd").unlink()
    (problem,) = node.install(host, settings)
    assert problem.message == "containerd is not installed on the node"


def test_no_network_yet(host: FakeNode, settings: Settings) -> None:
    conflist = host.path("/etc/cni/net.d/10-podnet.conflist")
    text = conflist.read_text()
    conflist.unlink()
    (problem,) = node.install(host, settings)
    assert problem.reason == "NetworkNotRouted"
    conflist.write_text(text)
    assert node.install(host, settings) == []


def test_the_first_configuration_counts(host: FakeNode, settings: Settings) -> None:
    host.path("/etc/cni/net.d/05-first.conflist").write_text('{"name": "n", "plugins": [{}]}')
    host.path("/etc/cni/net.d/00-readme.txt").write_text("no configuration")
    assert any("05-first" in problem.message for problem in node.install(host, settings))


def test_a_runtime_that_the_handler_runc_names(host: FakeNode, settings: Settings) -> None:
    host.runc = "/usr/bin/nvidia-container-runtime"
    (problem,) = node.install(host, settings)
    assert host.runc in problem.message
    host.path(host.runc).touch(mode=0o755)
    assert node.install(host, settings) == []
    assert json.loads(host.read("/opt/godwit/etc/hook.json") or "") == {"runtime": host.runc}


def test_a_configuration_of_version_2(host: FakeNode, settings: Settings) -> None:
    main = host.path(settings.config)
    main.write_text(main.read_text().replace("version = 3", "version = 2"))
    assert node.install(host, settings) == []
    assert list(host.drop_in()["plugins"]) == ["io.containerd.grpc.v1.cri"]


def test_a_drop_in_that_is_not_imported_is_taken_back(host: FakeNode, settings: Settings) -> None:
    host.imports = False
    (problem,) = node.install(host, settings)
    assert "does not import" in problem.message
    assert not host.path(settings.drop_in).exists()
    assert not host.restarts()


def test_a_drop_in_that_disturbs_is_taken_back(host: FakeNode, settings: Settings) -> None:
    host.disturbs = True
    (problem,) = node.install(host, settings)
    assert "other settings" in problem.message
    assert not host.path(settings.drop_in).exists()
    assert not host.restarts()


def test_a_restart_that_fails_is_undone(host: FakeNode, settings: Settings) -> None:
    host.restart_works = False
    (problem,) = node.install(host, settings)
    assert f"`{RESTART}` failed" in problem.message
    assert not host.path(settings.drop_in).exists()


def test_a_containerd_that_does_not_come_back_gets_its_old_configuration(
    host: FakeNode, settings: Settings
) -> None:
    host.comes_back = False
    (problem,) = node.install(host, settings)
    assert "did not come back" in problem.message
    assert not host.path(settings.drop_in).exists()
    assert host.restarts() == 2


def test_no_space_is_said_before_anything_is_written(
    host: FakeNode, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = host.files()
    monkeypatch.setattr(node, "_SPACE_BYTES", {"/run": 1 << 60})
    (problem,) = node.install(host, settings)
    assert problem.reason == "NotEnoughSpace"
    assert problem.message.startswith("/run has ")
    assert host.files() == before


def test_uninstall_leaves_the_node_as_it_was(host: FakeNode, settings: Settings) -> None:
    before = host.files()
    limits = {name: host.read(f"/proc/sys/fs/{name}") for name in node._PIPE_LIMITS}
    node.install(host, settings)
    assert host.read("/proc/sys/fs/pipe-max-size") == "16777216"
    assert host.read("/proc/sys/fs/pipe-user-pages-soft") == "0"
    node.uninstall(host, settings)
    assert host.files() == before
    assert {name: host.read(f"/proc/sys/fs/{name}") for name in limits} == limits
    assert not host.running
    assert host.restarts() == 2


def test_limits_that_somebody_else_has_set_stay(host: FakeNode, settings: Settings) -> None:
    host.path("/proc/sys/fs/pipe-max-size").write_text("33554432")
    node.install(host, settings)
    assert host.read("/proc/sys/fs/pipe-max-size") == "33554432"
    host.path("/proc/sys/fs/pipe-user-pages-soft").write_text("5")
    node.uninstall(host, settings)
    assert host.read("/proc/sys/fs/pipe-user-pages-soft") == "5"


def test_uninstall_twice_and_without_install(host: FakeNode, settings: Settings) -> None:
    node.uninstall(host, settings)
    node.install(host, settings)
    node.uninstall(host, settings)
    node.uninstall(host, settings)
    assert host.restarts() == 2


def test_a_directory_of_others_stays(host: FakeNode, settings: Settings) -> None:
    host.path("/etc/containerd/conf.d").mkdir()
    node.install(host, settings)
    node.uninstall(host, settings)
    assert host.path("/etc/containerd/conf.d").is_dir()


def test_nothing_is_undone_while_containers_use_the_handler(
    host: FakeNode, settings: Settings
) -> None:
    node.install(host, settings)
    tasks = host.path("/run/containerd/io.containerd.runtime.v2.task/k8s.io")
    for name, options in (
        ("ours", '{"binary_name":"/opt/godwit/bin/godwit-runc"}'),
        ("other", "{}"),
    ):
        (tasks / name).mkdir(parents=True)
        (tasks / name / "options.json").write_text(options)
    (tasks / "starting").mkdir()
    before = host.files()
    with pytest.raises(InUse, match=r"handler: ours$"):
        node.uninstall(host, settings)
    assert host.files() == before
    assert host.running


def test_what_a_lost_shim_has_left_is_not_in_use(host: FakeNode) -> None:
    tasks = host.path("/run/containerd/io.containerd.runtime.v2.task/k8s.io")
    for name in ("dead", "gone", "lives", "ended"):
        (tasks / name).mkdir(parents=True)
        (tasks / name / "options.json").write_text('{"binary_name":"/opt/godwit/bin/godwit-runc"}')
        said = {"version": 3, "address": f"unix:///run/{name}", "protocol": "ttrpc"}
        (tasks / name / "bootstrap.json").write_text(json.dumps(said))
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as lives:
        dead.bind(str(host.path("/run/dead")))
        lives.bind(str(host.path("/run/lives")))
        lives.listen()
        (tasks / "ended" / "bootstrap.json").write_text('{"address":"unix:///run/lives"}')
        (tasks / "ended" / "init.pid").write_text("77")
        (tasks / "lives" / "init.pid").write_text("78")
        host.path("/proc/78").mkdir()
        assert node.in_use(host) == ["lives"]


@pytest.mark.parametrize(
    "path",
    ["/etc/containerd/config.toml", "/etc/cni/net.d/00-new.conflist", "/opt/cni/bin/godwit",
     "/etc/containerd/conf.d/other.toml", "/usr/bin/containerd", "/opt/godwit/etc/hook.json"],
)  # fmt: skip
def test_the_fingerprint_sees_changes(host: FakeNode, settings: Settings, path: str) -> None:
    node.install(host, settings)
    before = node.fingerprint(host, settings)
    assert node.fingerprint(host, settings) == before
    if host.path(path).exists():
        host.write(path, "changed", 0o755)
    else:
        host.path(path).touch()
    assert node.fingerprint(host, settings) != before


def test_the_fingerprint_sees_what_is_gone(host: FakeNode, settings: Settings) -> None:
    node.install(host, settings)
    before = node.fingerprint(host, settings)
    host.remove("/opt/cni/bin/godwit")
    assert node.fingerprint(host, settings) != before
    assert node.install(host, settings) == []
    assert host.path("/opt/cni/bin/godwit").exists()


def test_writing_leaves_no_part_behind(host: FakeNode) -> None:
    assert host.write("/a/b", "x")
    assert not host.write("/a/b", "x")
    assert host.write("/a/b", "y", 0o600)
    assert [path.name for path in host.path("/a").iterdir()] == ["b"]
    assert stat.S_IMODE(host.path("/a/b").stat().st_mode) == 0o600


def test_uninstall_removes_what_agents_leave_behind(host: FakeNode, settings: Settings) -> None:
    host.tables = ["ip kube-proxy", "inet godwit_redirects"]
    node.install(host, settings)
    for path in ("cpu/godwit/abc", "memory/godwit-tools", "memory/kubepods", "godwit/abc"):
        host.path(f"/sys/fs/cgroup/{path}").mkdir(parents=True)
    node.uninstall(host, settings)
    left = {path.name for path in host.path("/sys/fs/cgroup").rglob("*")}
    assert left == {"cpu", "memory", "kubepods"}
    for family in ("-4", "-6"):
        assert f"{node.OPT}/criu/bin/ip {family} route flush proto 87" in host.ran
    removed = [line for line in host.ran if "nft delete" in line]
    assert removed == [f"{node.OPT}/criu/bin/nft delete table inet godwit_redirects"]


def test_a_cgroup_with_processes_stays(host: FakeNode) -> None:
    inside = host.path("/sys/fs/cgroup/cpu/godwit/abc/cgroup.procs")
    inside.parent.mkdir(parents=True)
    inside.write_text("1")
    host.remove_cgroup("/sys/fs/cgroup/cpu/godwit")
    assert inside.exists()


def test_names_are_those_of_the_agent() -> None:
    assert routes.PROTOCOL == node.ROUTE_PROTOCOL
    assert {redirects.TABLE[:7], connections._TABLE[:7]} == {node.TABLES}
    assert {cgroups._GUARD, survive._CGROUP} == set(node.CGROUPS)


def test_waiting_for_containers_ends(host: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [["a"], ["a"], []]
    monkeypatch.setattr(node, "in_use", lambda _: left.pop(0))
    monkeypatch.setattr(node.time, "sleep", lambda _: None)
    node.await_unused(host, 60.0)
    assert left == []
    monkeypatch.setattr(node, "in_use", lambda _: ["a"])
    node.await_unused(host, 0.0)
