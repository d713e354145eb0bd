"""Which addresses a call may name, and by which of its own a node is reached."""

from __future__ import annotations

import pytest

from godwit_agent.app.model import PeerNode, Pod
from godwit_agent.server import decode
from godwit_api.errors import Rejected
from godwit_api.pb import agent_pb2 as pb

UID = "01234567-89ab-cdef-0123-456789abcdef"


def ref(ip: str, *more: str) -> pb.PodRef:
    return pb.PodRef(namespace="ns", name="p", uid=UID, ip=ip, more_ips=more)


@pytest.mark.parametrize("ips", [("10.0.0.5",), ("fd00::5",), ("10.0.0.5", "fd00::5")])
def test_one_of_each_family(ips: tuple[str, ...]) -> None:
    found = decode.pod(ref(*ips))
    assert found.ips == ips
    assert Pod.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "ips",
    [
        ("",),
        ("10.0.0.300",),
        ("10.0.0.5", "10.0.0.6"),
        ("10.0.0.5", "fd00::5", "fd00::6"),
        ("fe80::5",),
        ("::",),
        ("ff02::1",),
        ("::1",),
        ("fd00::5%eth0",),
    ],
)
def test_what_is_no_address_of_a_pod(ips: tuple[str, ...]) -> None:
    with pytest.raises(Rejected):
        decode.pod(ref(*ips))


def test_a_node_is_reached_by_its_address_of_the_family() -> None:
    message = pb.PeerNode(
        name="n", address="10.0.0.1", control_port=1, transfer_port=2, more_addresses=["fd00::1"]
    )
    peer = decode.peer(message, "target")
    assert PeerNode.from_json(peer.to_json()) == peer
    assert peer.address_for("10.1.1.1") == "10.0.0.1"
    assert peer.address_for("fd01::1") == "fd00::1"
    assert PeerNode("n", "10.0.0.1", 1, 2).address_for("fd01::1") is None
