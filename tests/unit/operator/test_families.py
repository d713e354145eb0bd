"""What follows from an address of each family: records, routes, slices, refusals. Pure parts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from godwit_api.migration import PodMigration
from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator.addresses import Moved, routes, usable, wanted
from godwit_operator.bridge import slice_bodies
from godwit_operator.messages import pod_ref, successor_ref
from godwit_operator.quantity import number
from godwit_operator.targets import Free, node_obstacles

FOUR, SIX = "10.0.1.5", "fd00:1::5"


def pod(*ips: str, **annotations: str) -> Pod:
    body: dict[str, Any] = {
        "metadata": {"name": "p", "uid": "u", "annotations": annotations},
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]},
    }
    return msgspec.convert(body, Pod)


def migration(*ips: str, **status: Any) -> PodMigration:
    body = {
        "metadata": {"name": "m", "namespace": "ns", "uid": "m"},
        "spec": {"podName": "p"},
        "status": {
            "podIP": ips[0],
            "podIPs": list(ips),
            "podUID": "u",
            "successorUID": "s",
            "successorName": "p",
            "sourceNode": "n1",
            "targetNode": "n2",
            **status,
        },
    }
    return msgspec.convert(body, PodMigration)


def node(*addresses: str) -> Node:
    listed = [{"type": "InternalIP", "address": one} for one in addresses]
    conditions = [{"type": "Ready", "status": "True"}]
    body = {
        "metadata": {"name": "n2", "labels": {"godwit.io/node": "ready"}},
        "status": {"addresses": listed, "conditions": conditions},
    }
    return msgspec.convert(body, Node)


def test_both_addresses_are_named_to_the_agents() -> None:
    for found in (
        pod_ref(migration(FOUR, SIX)),
        pod_ref(migration(FOUR), pod=pod(FOUR, SIX)),
        successor_ref(migration(FOUR, SIX)),
    ):
        assert (found.ip, list(found.more_ips)) == (FOUR, [SIX])
    assert list(pod_ref(migration(SIX)).more_ips) == []


def test_every_node_hears_of_both() -> None:
    moved = pod(FOUR, SIX, **{"godwit.io/address": f"{FOUR},{SIX}"})
    assert {(one.ip, one.node) for one in wanted([moved], [])} == {(FOUR, "n1"), (SIX, "n1")}
    running = migration(FOUR, SIX, phase="Committed", handover={"committed": True})
    assert {(one.ip, one.node) for one in wanted([moved], [running])} == {
        (FOUR, "n2"),
        (SIX, "n2"),
    }


def test_a_node_is_told_of_what_it_can_route() -> None:
    moved = [Moved(FOUR, "n2", "u"), Moved(SIX, "n2", "u"), Moved("10.0.1.6", "gone", "u")]
    told = list(routes(moved, {"n2": node("192.0.2.2", "2001:db8::2")}))
    assert [(one.ip, one.node_address) for one in told] == [
        (FOUR, "192.0.2.2"),
        (SIX, "2001:db8::2"),
    ]
    assert [one.ip for one in usable(told, node("192.0.2.3"))] == [FOUR]
    assert usable(told, node("192.0.2.3", "2001:db8::3")) == told == usable(told, None)


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        (["IPv4"], {"IPv4": [FOUR]}),
        (["IPv6"], {"IPv6": [SIX]}),
        (["IPv6", "IPv4"], {"IPv4": [FOUR], "IPv6": [SIX]}),
        (None, {"IPv4": [FOUR]}),
    ],
)
def test_a_slice_of_each_family_of_the_service(
    families: list[str] | None, expected: dict[str, list[str]]
) -> None:
    service = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}
    if families:
        service["spec"]["ipFamilies"] = families  # type: ignore[index]
    bodies = slice_bodies(migration(FOUR, SIX), service, pod(FOUR, SIX))
    assert {b["addressType"]: b["endpoints"][0]["addresses"] for b in bodies} == expected
    assert len({body["metadata"]["name"] for body in bodies}) == len(bodies)


def test_a_node_without_an_address_of_the_family_is_refused() -> None:
    room = Free(cpu=number(1), memory=number(1))
    both = node("192.0.2.2", "2001:db8::2")
    assert node_obstacles(both, pod(FOUR, SIX), None, {"n2"}, room) == []
    assert both.address_for(SIX) == "2001:db8::2"
    (found,) = node_obstacles(node("192.0.2.2"), pod(FOUR, SIX), None, {"n2"}, room)
    assert found.reason == Reason.NETWORK_NOT_ROUTED
    assert "IPv6" in found.message
