"""A pod with an address of each family: the hook, the routes, the neighbours on a bridge."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath, Moment, Packet
from godwit_agent.hostops.net.links import find_link
from godwit_agent.hostops.net.network import HostNetworks
from godwit_agent.hostops.net.routes import HostRoutes
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


def _layout(here: Scene) -> Layout:
    return replace(
        Layout(),
        host_pid=os.getpid(),
        host_netns=f"/run/netns/{here.host}",
        run_dir=HostPath(str(here.state)),
    )


def _answer(here: Scene, to: str, port: int) -> str | None:
    """The link address that the host hears when it sends to ``to``; None when nobody answers."""
    with udp(here.host, ipv6=":" in to) as asking:
        asking.sendto(b"x", (to, port))
    while True:
        for known in here.ip(here.host, "neigh", "show", "to", to):
            if "lladdr" in known:
                return str(known["lladdr"])
            if "FAILED" in known["state"]:
                return None
        time.sleep(0.02)


@pytest.mark.parametrize("address", [IPV4, IPV6])
def test_only_behind_an_open_door_the_address_is_answered_for(
    scene: Scene,  # noqa: F811
    routes: HostRoutes,
    address: str,
) -> None:
    """Else others on a bridge would learn it from a successor that may never run, or from a
    source that is about to go."""
    _expect(scene)
    gateways = [one["gateway"] for one in _add(scene)["ips"]]
    record = json.loads((scene.expectation / "network.json").read_text())
    mac = record["pod_mac"]
    host = ("ip", "-n", scene.host)
    to = (address, "dev", record["host_interface"])
    run(*host, "route", "add", *to)
    assert _answer(scene, address, 9) is None
    network = HostNetworks(_layout(scene)).open(
        *(scene.netns, "eth0", record["host_interface"], mac, record["host_mac"])
    )
    try:
        # the node is told, so that no packet is lost to a question that nobody answers
        routes.local(address, record["host_interface"], mac)
        with (
            udp(scene.host, ipv6=":" in address) as outside,
            udp(scene.pod, ipv6=":" in address) as inside,
        ):
            inside.bind((address, 0))
            outside.bind((gateways[":" in address], 0))
            begin = time.time_ns()
            outside.sendto(b"closed", inside.getsockname())
            held: tuple[Packet, ...] = ()
            while not held:
                held = network.held(syn_since_ns=begin, since=Moment(begin, begin))
            with pytest.raises(PermissionError):
                inside.sendto(b"out", outside.getsockname())
            network.open_door()
            network.inject(held)
            assert inside.recv(16) == b"closed"
            outside.sendto(b"open", inside.getsockname())
            assert inside.recv(16) == b"open"
            run(*host, "neigh", "del", *to)
            assert _answer(scene, address, 9) == mac
            network.drop()
            network.fall_silent()
            run(*host, "neigh", "del", *to)
            assert _answer(scene, address, 9) is None
    finally:
        network.close()


@pytest.fixture
def routes(scene: Scene) -> Iterator[HostRoutes]:  # noqa: F811
    made = HostRoutes(_layout(scene))
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


@contextlib.contextmanager
def neighbour(here: Scene) -> Iterator[str]:
    """A namespace on the pod's bridge."""
    name = f"{here.pod}-n"
    run("ip", "netns", "add", name)
    try:
        ends = ("v9", "type", "veth", "peer", "eth0", "netns", name)
        run("ip", "-n", here.host, "link", "add", *ends)
        run("ip", "-n", here.host, "link", "set", "v9", "master", "cni0", "up")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "addr", "add", "10.99.0.99/24", "dev", "eth0")
        run("ip", "-n", name, "addr", "add", "fd99::99/64", "dev", "eth0", "nodad")
        run("ip", "-n", name, "route", "add", "default", "via", "10.99.0.1")
        # The address that a router's redirects come from: those of another are not believed.
        (bridge,) = here.ip(here.host, "addr", "show", "dev", "cni0")
        (own,) = [one["local"] for one in bridge["addr_info"] if one["local"].startswith("fe80")]
        run("ip", "-n", name, "route", "add", "default", "via", own, "dev", "eth0")
        yield name
    finally:
        run("ip", "netns", "del", name)


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
        routes.local(ip, veth, "02:00:00:00:77:05")
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


@pytest.mark.parametrize("family", [0, 1])
def test_on_a_bridge_neighbours_and_node_find_who_has_left_and_come_back(
    scene: Scene,  # noqa: F811
    routes: HostRoutes,
    family: int,
) -> None:
    result = _main(scene, "bridge")
    native = result["ips"][family]["address"].partition("/")[0]
    _uplink(scene)
    forwarding = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    run("ip", "netns", "exec", scene.host, "sysctl", "-qw", *forwarding)
    ports = [one for one in scene.ip(scene.host, "link", "show") if one.get("master") == "cni0"]
    (link,) = scene.ip(scene.pod, "link", "show", "dev", "eth0")
    (bridge,) = [one for one in scene.ip(scene.host, "link", "show") if one["ifname"] == "cni0"]
    with neighbour(scene) as name:

        def known(side: str) -> list[str]:
            listed = scene.ip(side, "neigh", "show", "to", native)
            return [entry["lladdr"] for entry in listed if "lladdr" in entry]

        def learnt(wanted: str) -> None:
            with udp(name, ipv6=bool(family)) as asking:
                asking.sendto(b"x", (native, 9))
            for _ in range(100):
                if known(name) == [wanted]:
                    return
                time.sleep(0.05)
            raise AssertionError(f"{known(name)} is not {wanted}")

        learnt(link["address"])
        routes.via(native, ("198.51.100.9", "2001:db8::9")[family])
        learnt(bridge["address"])
        run("ip", "-n", name, "neigh", "flush", "all")
        run("ip", "-n", scene.pod, "link", "set", "eth0", "down")
        learnt(bridge["address"])
        # It comes back with another interface, and the node still knows the former one.
        former = ("lladdr", link["address"], "dev", "cni0", "nud", "reachable")
        run("ip", "-n", scene.host, "neigh", "replace", native, *former)
        again = "02:00:00:00:77:05"
        run("ip", "-n", scene.pod, "link", "set", "eth0", "address", again)
        routes.local(native, ports[0]["ifname"], again)
        assert known(scene.host) == [again]
        learnt(again)
        assert [(one.interface, one.via) for one in routes.list()] == [(ports[0]["ifname"], None)]
        run("ip", "-n", scene.host, "link", "del", ports[0]["ifname"])
        assert [(one.interface, one.via) for one in routes.list()] == [(None, None)]
        routes.remove(native)
        assert routes.list() == ()
