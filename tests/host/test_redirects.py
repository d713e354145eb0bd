"""A pod that has moved to a bridge and moves on: its neighbours there still find it."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Iterator

import pytest

from godwit_agent.hostops.net.network import HostNetworks
from godwit_agent.hostops.net.redirects import TABLE
from godwit_agent.hostops.net.routes import HostRoutes
from host.test_both_families import (  # noqa: F401
    IPV4,
    IPV6,
    _expect,
    _layout,
    _main,
    _uplink,
    neighbour,
    routes,
)
from host.test_hook_network import Scene, pytestmark, run, scene, socket_of, udp  # noqa: F401

ELSEWHERE = {IPV4: "198.51.100.9", IPV6: "2001:db8::9"}


@contextlib.contextmanager
def _wire(netns: str, interface: str) -> Iterator[socket.socket]:
    """All frames that arrive at an interface."""
    with socket_of(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)) as made:
        made.bind((interface, 3))
        made.settimeout(5)
        yield made


@pytest.mark.parametrize("address", [IPV4, IPV6])
def test_a_neighbour_of_a_former_bridge_finds_who_has_moved_on(
    scene: Scene,  # noqa: F811
    routes: HostRoutes,  # noqa: F811
    address: str,
) -> None:
    """Routers tell of shorter ways. To the pod's interface that way ends with the next move."""
    ipv6 = ":" in address
    _expect(scene)
    scene.godwit(_main(scene, "bridge"))
    record = json.loads((scene.expectation / "network.json").read_text())
    port, mac = record["host_interface"], record["pod_mac"]
    _uplink(scene)
    there = ("neigh", "replace", ELSEWHERE[address], "lladdr", "02:00:00:00:77:09", "dev", "up0")
    run("ip", "-n", scene.host, *there)
    forwarding = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    run("ip", "netns", "exec", scene.host, "sysctl", "-qw", *forwarding)
    network = HostNetworks(_layout(scene)).open(scene.netns, "eth0", port, mac, record["host_mac"])
    network.open_door()
    network.close()
    with (
        neighbour(scene) as near,
        udp(near, ipv6=ipv6) as asking,
        udp(scene.pod, ipv6=ipv6) as inside,
        _wire(scene.host, "up1") as wire,
    ):
        inside.bind((address, 0))
        # else the kernel does not believe a redirect of IPv6 (ip6_redirect_nh_match)
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        routes.local(address, port, mac)
        # The second redirect is believed, when the pod's link address is known. It comes after
        # 40 ms (ip_rt_send_redirect, net/ipv4/route.c) or a second (ip6_forward).
        until = time.monotonic() + (2.5 if ipv6 else 0.5)
        while time.monotonic() < until:
            asking.sendto(b"here", inside.getsockname())
            assert inside.recv(16) == b"here"
            time.sleep(0.01)
        shown = run("ip", "-n", near, "route", "get", address)
        routes.via(address, ELSEWHERE[address])
        asking.sendto(b"moved on", inside.getsockname())
        while not (frame := wire.recv(2000)).endswith(b"moved on"):
            pass
        assert frame[:6] == bytes.fromhex("020000007709"), shown


def test_addresses_are_forgotten_that_neither_move_nor_have_moved(
    scene: Scene,  # noqa: F811
    routes: HostRoutes,  # noqa: F811
) -> None:
    _uplink(scene)

    def listed() -> str:
        return run("ip", "netns", "exec", scene.host, "nft", "list", "ruleset")

    assert listed() == ""
    routes.prepare((IPV4, IPV6))
    routes.via(IPV6, ELSEWHERE[IPV6])
    prepared = listed()
    v4, v6 = (f"{int(ipaddress.ip_address(one)):#x}" for one in (IPV4, IPV6))
    assert f"table inet {TABLE}" in prepared
    assert v4 in prepared
    assert v6 in prepared
    run("ip", "netns", "exec", scene.host, "nft", "flush", "ruleset")
    routes.prepare((IPV4,))
    assert listed() == prepared, "another program's flush is repaired with the next move"
    routes.settle([IPV4])
    assert listed() == prepared
    routes.settle([])
    assert v4 not in listed()
    assert v6 in listed()
    again = HostRoutes(_layout(scene))
    again.close()
    assert v6 in listed(), "an agent that starts anew finds the addresses in its routes"
    routes.remove(IPV6)
    routes.settle([])
    assert listed() == ""
