"""What the installer reads from containerd and CNI, and what it adds."""

from __future__ import annotations

import json
import tomllib

import pytest

from godwit_agent.install import cri, runtime_config
from godwit_agent.install.runtime_config import chain, drop_in, drop_in_problem, parse_dump
from unit.install.fake_node import CONFLIST, DUMP, DUMPED_HANDLER

PATH = "/etc/containerd/conf.d/godwit.toml"


def dump(*, runc: str = "", selinux: str = "false", handler: bool = False) -> str:
    return DUMP.format(runc=runc, selinux=selinux) + (DUMPED_HANDLER if handler else "")


def test_effective_configuration() -> None:
    found = parse_dump(dump(runc="/usr/local/bin/runc"))
    assert found.systemd_cgroup
    assert found.runc == "/usr/local/bin/runc"
    assert found.cni_bin_dirs == ("/opt/cni/bin", "/usr/lib/cni")
    assert found.cni_conf_dir == "/etc/cni/net.d"
    assert found.handlers == {"runc"}


def test_directories_before_containerd_2_2_have_one_name() -> None:
    text = dump().replace("bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']", "bin_dir = '/cni'")
    assert parse_dump(text).cni_bin_dirs == ("/cni",)


@pytest.mark.parametrize("text", ["version = 2\n[plugins]\n", "", "not toml ["])
def test_a_dump_without_the_runtime_plugin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_dump(text)


@pytest.mark.parametrize(
    ("text", "version"),
    [("version = 3", 3), ("version = 2", 2), ("", 2), ('imports = ["x"]', 2)],
)
def test_version_of_the_main_file(text: str, version: int) -> None:
    assert runtime_config.config_version(text) == version


@pytest.mark.parametrize("text", ["version = 1", "version = 4", "version = '3'", "version ="])
def test_versions_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        runtime_config.config_version(text)


@pytest.mark.parametrize(
    ("version", "plugin"), [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")]
)
def test_the_drop_in_speaks_the_main_files_version(version: int, plugin: str) -> None:
    made = tomllib.loads(drop_in(parse_dump(dump()), version))
    assert made["version"] == version
    assert list(made["plugins"]) == [plugin]
    (handler,) = made["plugins"][plugin]["containerd"]["runtimes"].items()
    assert handler == (
        "godwit",
        {
            "runtime_type": "io.containerd.runc.v2",
            "cni_conf_dir": "/etc/godwit/cni/net.d",
            "options": {"BinaryName": "/opt/godwit/bin/godwit-runc", "SystemdCgroup": True},
        },
    )


def test_a_drop_in_that_adds_the_handler_only_is_fine() -> None:
    assert drop_in_problem(parse_dump(dump()), parse_dump(dump(handler=True)), PATH) is None


def test_a_drop_in_that_is_not_read_names_the_line_to_add() -> None:
    problem = drop_in_problem(parse_dump(dump()), parse_dump(dump()), PATH)
    assert problem
    assert 'imports = ["/etc/containerd/conf.d/*.toml"]' in problem.message


def test_a_drop_in_that_changes_anything_else_is_a_problem() -> None:
    after = parse_dump(dump(handler=True, selinux="true"))
    problem = drop_in_problem(parse_dump(dump()), after, PATH)
    assert problem
    assert "taken back" in problem.message


@pytest.mark.parametrize(
    ("said", "fine"),
    [
        ("containerd github.com/containerd/containerd/v2 2.1.9+unknown", True),
        ("containerd containerd.io v2.0.0 abc", True),
        ("containerd containerd.io 12.4.1 abc", True),
        ("containerd github.com/containerd/containerd v1.7.27 05044ec", False),
        ("", False),
    ],
)
def test_containerd_2_is_needed(said: str, fine: bool) -> None:
    assert (runtime_config.version_problem(said) is None) is fine


def test_the_chain_is_the_nodes_own_with_us_at_its_end() -> None:
    text, problems = chain("x.conflist", json.dumps(CONFLIST))
    assert not problems
    assert text
    assert json.loads(text) == {
        **CONFLIST,
        "plugins": [*CONFLIST["plugins"], {"type": "godwit"}],
    }


def test_the_chain_of_a_chain_has_us_once() -> None:
    first, _ = chain("x.conflist", json.dumps(CONFLIST))
    assert first
    assert chain("x.conflist", first) == (first, [])


def test_a_single_plugin_becomes_a_list() -> None:
    single = {
        "cniVersion": "0.4.0",
        "name": "net",
        "type": "bridge",
        "ipam": {"type": "host-local"},
    }
    text, problems = chain("x.conf", json.dumps(single))
    assert not problems
    made = json.loads(text or "")
    assert (made["name"], made["cniVersion"]) == ("net", "0.4.0")
    assert [plugin["type"] for plugin in made["plugins"]] == ["bridge", "godwit"]


def test_networks_that_cannot_follow_are_named_with_every_reason() -> None:
    other = {"name": "n", "plugins": [{"type": "cilium-cni"}]}
    text, problems = chain("05-cilium.conflist", json.dumps(other))
    assert text  # what it would be; the caller does not install it
    assert [problem.reason for problem in problems] == ["NetworkNotRouted", "AddressNotReservable"]
    assert all("05-cilium.conflist" in problem.message for problem in problems)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"name": "n", "plugins": []}', '{"name": "n", "plugins": {}}',
     '{"name": "n", "plugins": ["ptp"]}', '{"plugins": [{"type": "ptp"}]}'],
)  # fmt: skip
def test_files_that_are_no_configuration(text: str) -> None:
    made, problems = chain("x.conflist", text)
    assert made is None
    assert [problem.reason for problem in problems] == ["NetworkNotRouted"]


def _handler(name: bytes) -> bytes:
    inner = b"\x0a" + bytes([len(name)]) + name + b"\x12\x04\x08\x01\x10\x01"
    return b"\x1a" + bytes([len(inner)]) + inner


@pytest.mark.parametrize(
    ("reply", "known"),
    [
        (_handler(b"runc") + _handler(b"godwit"), True),
        (_handler(b"") + _handler(b"godwit-two") + _handler(b"xgodwit"), False),
        (b"\x0a\x06godwit", False),
        (b"", False),
    ],
)
def test_handlers_of_a_cri_status(reply: bytes, known: bool) -> None:
    assert cri.knows(reply, "godwit") is known
