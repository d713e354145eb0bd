"""A pod's interface and its other end on the host, over netlink."""

from __future__ import annotations

import socket
from typing import Any

from pyroute2 import IPRoute

from godwit_agent.hostops.model import Link
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

_GLOBAL = 0  # RT_SCOPE_UNIVERSE, linux/rtnetlink.h
_INTERFACE = "eth0"  # the CNI specification's name for the pod's interface under Kubernetes


def find_link(netns: str, host_netns: str | None) -> Link:
    """``Retryable(Internal)`` when the pod has no such interface or it has no other end."""
    inside = NetnsThread(netns)
    try:
        found = inside.call(_inside)
    finally:
        inside.close()
    if found is None:
        raise Retryable(Reason.INTERNAL, f"{netns} has no {_INTERFACE} with an end on the host")
    mac, peer, addresses = found
    outside = NetnsThread(host_netns)
    try:
        link = outside.call(lambda: _outside(peer))
    finally:
        outside.close()
    if link is None:
        raise Retryable(Reason.INTERNAL, f"the host has no interface {peer} of {netns}")
    name, host_mac = link
    return Link(_INTERFACE, mac, name, peer, host_mac, addresses)


def _inside() -> tuple[str, int, tuple[str, ...]] | None:
    with IPRoute() as netlink:
        found = _by_name(netlink, _INTERFACE)
        if found is None or not found.get_attr("IFLA_LINK"):
            return None
        addresses = tuple(
            str(address.get_attr("IFA_ADDRESS"))
            for family in (socket.AF_INET, socket.AF_INET6)
            for address in netlink.get_addr(family=family, index=found["index"])
            if address["scope"] == _GLOBAL
        )
        return str(found.get_attr("IFLA_ADDRESS")), int(found.get_attr("IFLA_LINK")), addresses


def _outside(index: int) -> tuple[str, str] | None:
    with IPRoute() as netlink:
        for link in netlink.get_links(index):
            return str(link.get_attr("IFLA_IFNAME")), str(link.get_attr("IFLA_ADDRESS"))
    return None


def _by_name(netlink: IPRoute, name: str) -> Any:
    for link in netlink.get_links():
        if link.get_attr("IFLA_IFNAME") == name:
            return link
    return None
