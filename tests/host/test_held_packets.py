"""What comes while a door opens or closes: the change takes a millisecond to be in force."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from godwit_agent.hostops.model import HostPath, Moment
from godwit_agent.hostops.net import packets
from godwit_agent.hostops.net.links import find_link
from godwit_agent.hostops.net.network import HostNetworks, HostPodNetwork
from host.test_both_families import _layout
from host.test_hook_network import Scene, pytestmark, scene, socket_of, udp  # noqa: F401

SEGMENT, DATAGRAM = b"a segment", b"a datagram"


@pytest.fixture
def address(scene: Scene) -> str:  # noqa: F811
    return str(scene.ptp()["ips"][0]["address"].partition("/")[0])


@pytest.fixture
def network(scene: Scene, address: str) -> Iterator[HostPodNetwork]:  # noqa: F811
    link = find_link(scene.netns, f"/run/netns/{scene.host}")
    made = HostNetworks(_layout(scene)).open(
        *(HostPath(scene.netns), "eth0", link.host_interface, link.pod_mac, link.host_mac)
    )
    yield made
    made.close()


class _Amid:
    """Sends one of each kind after the change has begun and before it is in force."""

    def __init__(self, network: HostPodNetwork, send: Callable[[], None]) -> None:
        self._run, self._send, self._network = network._nft.run, send, network
        network._nft.run = self  # type: ignore[assignment]

    def __call__(self, rules: str) -> str:
        self._send()
        while sum(_is(frame.data) is not None for frame in self._network._capture.frames()) < 2:
            time.sleep(0.001)
        return self._run(rules)


def _is(frame: bytes) -> bytes | None:
    return next((one for one in (SEGMENT, DATAGRAM) if frame.endswith(one)), None)


@pytest.mark.parametrize("change", ["lift", "drop"])
def test_a_segment_amid_a_change_is_not_lost_and_a_datagram_does_not_come_twice(
    scene: Scene,  # noqa: F811
    address: str,
    network: HostPodNetwork,
    change: str,
) -> None:
    with (
        socket_of(scene.pod, lambda: socket.create_server((address, 0))) as listening,
        socket_of(
            scene.host, lambda: socket.create_connection(listening.getsockname(), timeout=10)
        ) as client,
        listening.accept()[0] as server,
        udp(scene.host) as asking,
        udp(scene.pod) as asked,
    ):
        asked.bind((address, 0))

        def send() -> None:
            client.sendall(SEGMENT)
            asking.sendto(DATAGRAM, asked.getsockname())

        begin = time.time_ns()
        network.hold_syns()
        if change == "drop":
            _Amid(network, send)
            window = {"since": network.drop(), "until": None}
        else:
            dropped = network.drop()
            _Amid(network, send)
            window = {"since": dropped, "until": network.lift()}
        held = [_is(one.data) for one in network.held(syn_since_ns=begin, **window)]
        assert SEGMENT in held, "it was dropped, and its sender waits 200 ms before the next"
        assert DATAGRAM not in held, "it may have been delivered"
        if change == "lift":
            network.inject(network.held(syn_since_ns=begin, **window))
            server.settimeout(10)
            assert server.recv(100) == SEGMENT


def test_no_packet_is_in_hand_when_the_others_are_counted(
    scene: Scene,  # noqa: F811
    address: str,
    network: HostPodNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads read: one may have taken a packet from the socket that it has not put down."""
    begin = time.time_ns()
    taken, go_on = threading.Event(), threading.Event()
    keep = packets.Capture._keep

    def slowly(capture: packets.Capture, packet: packets.Packet) -> None:
        if not taken.is_set():
            taken.set()
            go_on.wait(10)
        keep(capture, packet)

    monkeypatch.setattr(packets.Capture, "_keep", slowly)
    with udp(scene.host) as asking:
        asking.sendto(DATAGRAM, (address, 9))
    assert taken.wait(10)
    threading.Timer(0.05, go_on.set).start()
    held = network.held(syn_since_ns=begin, since=Moment(begin, begin))
    assert DATAGRAM in [_is(one.data) for one in held]
