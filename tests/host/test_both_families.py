"""A pod with an address of each family: the hook, the routes, the neighbours on a bridge."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.links import find_link
from godwit_agent.hostops.routes import HostRoutes
from host.test_hook_network import Scene, plugins, pytestmark, run, scene, udp  # noqa: F401

IPV4, IPV6 = "10.77.5.9", "fd77:5::9"
SUBNETS = ("10.99.0.0/24", "fd99::/64")


def _main(here: Scene, kind: str, command: str = "ADD") -> dict[str, Any]:
    """The main plugin of a dual-stack chain."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": subnet}] for subnet in SUBNETS],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        "dataDir": str(here.ipam),
    }
    config = {"cniVersion": "1.0.0", "name": "net", "type": kind, "ipam": ipam}
    if kind == "bridge":
        config |= {"bridge": "cni0", "isGateway": True}
    done = here.plugin(f"{plugins()}/{kind}", command, config)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def _expect(here: Scene) -> None:
    here.expectation.mkdir(parents=True)
    record = {"ip": IPV4, "more_ips": [IPV6], "door": True, "containers": {}}
    (here.expectation / "expect.json").write_text(json.dumps(record))


def _add(here: Scene) -> dict[str, Any]:
    done = here.godwit(_main(here, "ptp"))
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _routes6(here: Scene, side: str) -> set[tuple[str, str | None]]:
    listed = json.loads(run("ip", "-6", "-n", side, "-j", "route", "show"))
    return {(one["dst"], one.get("gateway")) for one in listed if one["dst"] != "fe80::/64"}


def test_a_successor_gets_both_addresses(scene: Scene) -> None:  # noqa: F811
    _expect(scene)
    result = _add(scene)
    assert [one["address"] for one in result["ips"]] == [f"{IPV4}/32", f"{IPV6}/128"]
    (link,) = scene.ip(scene.pod, "addr", "show", "dev", "eth0")
    shown = [one for one in link["addr_info"] if one["scope"] == "global"]
    assert {(one["local"], one["prefixlen"]) for one in shown} == {(IPV4, 32), (IPV6, 128)}
    gateway = result["ips"][1]["gateway"]
    assert {(gateway, None), ("default", gateway)} <= _routes6(scene, scene.pod)
    assert {dst for dst, _ in _routes6(scene, scene.host)} == {gateway}
    found = find_link(scene.netns, f"/run/netns/{scene.host}")
    assert set(found.addresses) == {IPV4, IPV6}


def test_no_address_is_tentative(scene: Scene) -> None:  # noqa: F811
    """Else neither end would ask or answer for up to two seconds."""
    _expect(scene)
    _add(scene)
    for side in (scene.host, scene.pod):
        for link in scene.ip(side, "addr", "show"):
            told = [one for one in link["addr_info"] if one.get("tentative")]
            assert not told, (side, told)


def test_neighbours_are_found_through_a_closed_door(scene: Scene) -> None:  # noqa: F811
    """A packet that meets the door must not wait a second for the next solicitation."""
    _expect(scene)
    result = _add(scene)
    network = json.loads((scene.expectation / "network.json").read_text())
    run("ip", "-n", scene.host, "route", "add", f"{IPV6}/128", "dev", network["host_interface"])
    gateway = result["ips"][1]["gateway"]
    with udp(scene.host, ipv6=True) as outside, udp(scene.pod, ipv6=True) as inside:
        outside.bind((gateway, 0))
        inside.bind((IPV6, 0))
        outside.sendto(b"closed", inside.getsockname())
        watching = subprocess.run(
            ("ip", "-6", "-n", scene.host, "-j", "neigh", "show", "to", IPV6),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (known,) = json.loads(watching.stdout)
        assert known.get("lladdr") == network["pod_mac"], known
        with pytest.raises(PermissionError):
            inside.sendto(b"out", outside.getsockname())
        run("ip", "netns", "exec", scene.pod, "nft", "delete", "table", "inet", "godwit_door")
        outside.sendto(b"open", inside.getsockname())
        assert inside.recv(16) == b"open"


@pytest.fixture
def routes(scene: Scene) -> Iterator[HostRoutes]:  # noqa: F811
    made = HostRoutes(replace(Layout(), host_netns=f"/run/netns/{scene.host}"))
    yield made
    made.close()


def _uplink(here: Scene) -> None:
    """A link to other nodes."""
    link = ("ip", "-n", here.host, "link")
    run(*link, "add", "up0", "type", "veth", "peer", "up1")
    for name in ("up0", "up1"):
        run(*link, "set", name, "up")
    run("ip", "-n", here.host, "addr", "add", "198.51.100.1/24", "dev", "up0")
    run("ip", "-n", here.host, "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")


def test_routes_of_both_families_follow(scene: Scene, routes: HostRoutes) -> None:  # noqa: F811
    result = _main(scene, "ptp")
    (veth,) = [
        one["ifname"] for one in scene.ip(scene.host, "link", "show") if one["ifname"] != "lo"
    ]
    native = [one["address"].partition("/")[0] for one in result["ips"]]
    _uplink(scene)

    def shown() -> set[tuple[str, str | None]]:
        every = scene.routes(scene.host)
        return {(dst, gateway) for dst, gateway, _ in every} | _routes6(scene, scene.host)

    for ip, node in zip(native, ("198.51.100.9", "2001:db8::9"), strict=True):
        routes.via(ip, node)  # takes the place of the one that the main plugin has made
        assert (ip, node) in shown()
        assert (ip, None) not in shown()
        routes.local(ip, veth)
        assert (ip, None) in shown()
        assert (ip, node) not in shown()
        routes.via(ip, node)
    assert {(one.ip, one.via) for one in routes.list()} == {
        (native[0], "198.51.100.9"),
        (native[1], "2001:db8::9"),
    }
    for ip in native:
        routes.remove(ip)
    assert routes.list() == ()


def test_on_a_bridge_the_node_answers_for_who_has_left(
    scene: Scene,  # noqa: F811
    routes: HostRoutes,
) -> None:
    result = _main(scene, "bridge")
    native = result["ips"][1]["address"].partition("/")[0]
    _uplink(scene)
    run("ip", "netns", "exec", scene.host, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    name = f"{scene.pod}-n"
    run("ip", "netns", "add", name)
    try:
        run(
            "ip",
            "-n",
            scene.host,
            "link",
            "add",
            "v9",
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            name,
        )
        run("ip", "-n", scene.host, "link", "set", "v9", "master", "cni0", "up")
        run("ip", "-n", name, "addr", "add", "fd99::99/64", "dev", "eth0", "nodad")
        run("ip", "-n", name, "link", "set", "eth0", "up")

        def learnt() -> str:
            with udp(name, ipv6=True) as asking:
                asking.sendto(b"x", (native, 9))
            for _ in range(60):
                listed = scene.ip(name, "-6", "neigh", "show", "to", native)
                if found := [entry["lladdr"] for entry in listed if "lladdr" in entry]:
                    return str(found[0])
                time.sleep(0.05)
            raise AssertionError("nobody answers")

        (bridge,) = [one for one in scene.ip(scene.host, "link", "show") if one["ifname"] == "cni0"]
        assert learnt() != bridge["address"]
        routes.via(native, "2001:db8::9")
        assert learnt() == bridge["address"], "the announcement has not been heard"
        run("ip", "-n", name, "neigh", "flush", "all")
        run("ip", "-n", scene.pod, "link", "set", "eth0", "down")
        assert learnt() == bridge["address"]
    finally:
        run("ip", "netns", "del", name)
