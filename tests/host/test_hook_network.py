"""The CNI plugin after a real ptp plugin, in network namespaces of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from godwit_agent.hostops.net.netns import NetnsThread
from godwit_testbed import build
from host.lab import hook

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(
        not (shutil.which("ip") and shutil.which("nft")), reason="needs iproute2 and nftables"
    ),
]
UID = "0f0e-uid"
ADDRESS = "10.77.5.9"
CRIU_MARK = 0xC114
SANDBOX = "a" * 64


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@functools.cache
def plugins() -> str:
    """Directory of the node's CNI plugins; made when the testbed has not made it yet."""
    return str(build.node_root() / "usr/lib/cni")


@dataclass
class Scene:
    host: str
    pod: str
    state: Path
    ipam: Path

    @property
    def netns(self) -> str:
        return f"/run/netns/{self.pod}"

    @property
    def expectation(self) -> Path:
        return self.state / "expect" / UID

    def expect(self, *, door: bool = True, ip: str = ADDRESS) -> None:
        self.expectation.mkdir(parents=True)
        record = {"migration": "m", "epoch": 1, "ip": ip, "door": door, "containers": {}}
        (self.expectation / "expect.json").write_text(json.dumps(record))

    def ip(self, side: str, *words: str) -> Any:
        return json.loads(run("ip", "-n", side, "-j", *words) or "[]")

    def routes(self, side: str) -> set[tuple[str, str | None, str | None]]:
        found = self.ip(side, "route", "show")
        return {(one["dst"], one.get("gateway"), one.get("prefsrc")) for one in found}

    def plugin(
        self, binary: str, command: str, config: dict[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": SANDBOX,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": plugins(),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAME=p;K8S_POD_UID={UID}",
            "GODWIT_RUN_DIR": str(self.state),
        }
        argv = ["ip", "netns", "exec", self.host, binary]
        return subprocess.run(
            argv, input=json.dumps(config), env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def ptp(self, command: str = "ADD") -> dict[str, Any]:
        """What the main plugin of the chain does."""
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": "10.99.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.ipam),
        }
        config = {"cniVersion": "1.0.0", "name": "net", "type": "ptp", "ipam": ipam}
        done = self.plugin(f"{plugins()}/ptp", command, config)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout or "{}")
        return result

    def godwit(
        self, previous: dict[str, Any], command: str = "ADD"
    ) -> subprocess.CompletedProcess[str]:
        config = {"cniVersion": "1.0.0", "name": "net", "type": "godwit", "prevResult": previous}
        return self.plugin(str(hook()), command, config)

    def add(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Results of the main plugin and of ours."""
        previous = self.ptp()
        done = self.godwit(previous)
        assert done.returncode == 0, done.stdout + done.stderr
        return previous, json.loads(done.stdout)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    name = f"gwh-{secrets.token_hex(3)}"
    made = Scene(f"{name}-h", f"{name}-p", tmp_path / "run", tmp_path / "ipam")
    made.state.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        for netns in (made.host, made.pod):
            run("ip", "netns", "add", netns)
            stack.callback(run, "ip", "netns", "del", netns)
        run("ip", "-n", made.host, "link", "set", "lo", "up")
        yield made


def socket_of(netns: str, make: Callable[[], socket.socket]) -> socket.socket:
    """A socket of a network namespace; it stays there, whoever uses it."""
    thread = NetnsThread(f"/run/netns/{netns}")
    try:
        return thread.call(make)
    finally:
        thread.close()


def udp(netns: str, *, mark: int = 0, ipv6: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    made = socket_of(netns, lambda: socket.socket(family, socket.SOCK_DGRAM))
    made.settimeout(10)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return made


def door(scene: Scene) -> dict[str, list[Any]]:
    """The chains of the door with their policies, hooks and rules."""
    listing = json.loads(
        run("ip", "netns", "exec", scene.pod, "nft", "-j", "list", "table", "inet", "godwit_door")
    )["nftables"]
    chains = {one["chain"]["name"]: [one["chain"]] for one in listing if "chain" in one}
    for one in listing:
        if "rule" in one:
            chains[one["rule"]["chain"]].append(one["rule"]["expr"])
    return chains


def accepted(key: str, value: object) -> list[dict[str, Any]]:
    match = {"op": "==", "left": {"meta": {"key": key}}, "right": value}
    return [{"match": match}, {"accept": None}]


def test_a_successor_gets_the_address(scene: Scene) -> None:
    scene.expect()
    previous, result = scene.add()
    native = previous["ips"][0]
    assert native["address"].startswith("10.99.0.")

    changed = {**native, "address": f"{ADDRESS}/32"}
    assert result == {**previous, "ips": [changed]}

    (link,) = scene.ip(scene.pod, "addr", "show", "dev", "eth0")
    (address,) = [one for one in link["addr_info"] if one["family"] == "inet"]
    assert (address["local"], address["prefixlen"]) == (ADDRESS, 32)
    gateway = native["gateway"]
    assert scene.routes(scene.pod) == {
        (gateway, None, ADDRESS),
        ("default", gateway, ADDRESS),
    }
    # The route to the native address is gone; there is none to ours before the switch.
    assert scene.routes(scene.host) == set()

    (veth,) = [one for one in scene.ip(scene.host, "link", "show") if one["ifname"] != "lo"]
    assert json.loads((scene.expectation / "network.json").read_text()) == {
        "ip": ADDRESS,
        "native_ip": native["address"].partition("/")[0],
        "gateway": gateway,
        "netns": scene.netns,
        "interface": "eth0",
        "host_interface": veth["ifname"],
        "sandbox_id": SANDBOX,
        "pod_mac": link["address"],
        "host_mac": veth["address"],
    }


def test_the_door_is_closed(scene: Scene) -> None:
    scene.expect()
    scene.add()
    chains = door(scene)
    assert set(chains) == {"input", "output"}
    for name, key in (("input", "iifname"), ("output", "oifname")):
        chain, *rules = chains[name]
        assert (chain["hook"], chain["policy"]) == (name, "drop")
        assert rules == [accepted("mark", CRIU_MARK), accepted(key, "lo")]


def test_only_criu_and_loopback_pass_the_door(scene: Scene) -> None:
    scene.expect()
    scene.add()
    network = json.loads((scene.expectation / "network.json").read_text())
    gateway, veth = network["gateway"], network["host_interface"]
    # What the switch does later; the neighbours are known, so that no packet waits for an answer.
    run("ip", "-n", scene.host, "route", "add", f"{ADDRESS}/32", "dev", veth)
    for side, device, address, mac in (
        (scene.host, veth, ADDRESS, network["pod_mac"]),
        (scene.pod, "eth0", gateway, network["host_mac"]),
    ):
        run(
            "ip", "-n", side, "neigh", "replace", address, "lladdr", mac, "dev", device,
            "nud", "permanent",
        )  # fmt: skip
    run("ip", "-n", scene.pod, "link", "set", "lo", "up")
    with (
        udp(scene.host) as outside,
        udp(scene.pod) as inside,
        udp(scene.pod, mark=CRIU_MARK) as criu,
    ):
        outside.bind((gateway, 0))
        inside.bind((ADDRESS, 0))
        with pytest.raises(PermissionError):
            inside.sendto(b"out", outside.getsockname())
        criu.sendto(b"criu", outside.getsockname())
        assert outside.recv(16) == b"criu"  # and not what came before it
        inside.sendto(b"loopback", inside.getsockname())
        assert inside.recv(16) == b"loopback"

        outside.sendto(b"closed", inside.getsockname())
        run("ip", "netns", "exec", scene.pod, "nft", "delete", "table", "inet", "godwit_door")
        outside.sendto(b"open", inside.getsockname())
        assert inside.recv(16) == b"open"


def test_the_door_stays_open_when_told_so(scene: Scene) -> None:
    scene.expect(door=False)
    _, result = scene.add()
    assert result["ips"][0]["address"] == f"{ADDRESS}/32"
    assert run("ip", "netns", "exec", scene.pod, "nft", "list", "ruleset") == ""


def test_a_successor_that_gets_its_own_address(scene: Scene) -> None:
    scene.expect(ip="10.99.0.2")  # the first that host-local gives
    previous, result = scene.add()
    assert previous["ips"][0]["address"] == "10.99.0.2/24"
    assert result["ips"][0]["address"] == "10.99.0.2/32"
    assert scene.routes(scene.host) == set()
    assert ("default", "10.99.0.1", "10.99.0.2") in scene.routes(scene.pod)


def test_any_other_pod_is_left_alone(scene: Scene) -> None:
    previous = scene.ptp()
    before = scene.routes(scene.host), scene.routes(scene.pod)
    done = scene.godwit(previous)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout) == previous
    assert (scene.routes(scene.host), scene.routes(scene.pod)) == before
    assert before[0] == {(previous["ips"][0]["address"].partition("/")[0], None, None)}
    assert run("ip", "netns", "exec", scene.pod, "nft", "list", "ruleset") == ""


@pytest.mark.parametrize("held", [True, False])
def test_a_held_address_survives_the_main_plugins_del(scene: Scene, held: bool) -> None:
    previous = scene.ptp()
    native = previous["ips"][0]["address"].partition("/")[0]
    reservation = scene.ipam / "net" / native
    assert reservation.exists()
    if held:
        (scene.state / "held").mkdir()
        record = {"ip": native, "pod_uid": UID, "ipam_dirs": [str(reservation.parent)]}
        (scene.state / "held" / native).write_text(json.dumps(record))
    assert scene.godwit(previous, "DEL").returncode == 0
    scene.ptp("DEL")
    assert reservation.exists() == held


def test_add_fails_where_there_is_no_gateway(scene: Scene) -> None:
    scene.expect()
    previous = scene.ptp()
    del previous["ips"][0]["gateway"]
    done = scene.godwit(previous)
    assert done.returncode == 1
    assert "gateway" in json.loads(done.stdout)["msg"]
    assert not (scene.expectation / "network.json").exists()
