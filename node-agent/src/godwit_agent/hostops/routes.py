"""Host routes of moved addresses, marked with a route protocol number of our own."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from godwit_agent.hostops import neighbours
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostRoute
from godwit_agent.hostops.netns import NetnsThread
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

# An unassigned value of rtm_protocol (linux/rtnetlink.h): tells our routes from others'.
PROTOCOL = 87


class HostRoutes:
    """The real ``Routes``: works in the host's network namespace.

    Everything runs on one thread that lives there: pyroute2 opens a socket for each thread that
    calls it, in the namespace of that thread.
    """

    def __init__(self, layout: Layout) -> None:
        self._lock = threading.Lock()
        self._host = NetnsThread(layout.host_netns)
        self._netlink = self._host.call(IPRoute)

    def close(self) -> None:
        """Routes stay."""
        self._host.call(self._netlink.close)
        self._host.close()

    @staticmethod
    def _family(ip: str) -> tuple[int, str]:
        address = ipaddress.ip_address(ip)
        if address.version == 4:
            return socket.AF_INET, f"{ip}/32"
        return socket.AF_INET6, f"{ip}/128"

    def local(self, ip: str, host_interface: str) -> None:
        """The pod with ``ip`` is behind ``host_interface``."""
        with self._lock:
            self._host.call(lambda: self._local(ip, host_interface))

    def _local(self, ip: str, host_interface: str) -> None:
        family, target = self._family(ip)
        found = self._netlink.get_links(ifname=host_interface)
        if not found:
            raise Retryable(Reason.INTERNAL, f"no interface {host_interface} on this node")
        index = neighbours.through(found[0])
        self._replace(family, target, oif=index, scope=253 if family == 2 else 0)
        neighbours.stand_back(self._netlink, ip)

    def via(self, ip: str, node_address: str) -> None:
        """The pod with ``ip`` is on the node with ``node_address``."""
        with self._lock:
            self._host.call(lambda: self._via(ip, node_address))

    def _via(self, ip: str, node_address: str) -> None:
        family, target = self._family(ip)
        self._replace(family, target, gateway=node_address)
        neighbours.stand_in(self._netlink, ip)

    def _replace(self, family: int, target: str, **to: object) -> None:
        """One route only: the kernel's replace leaves routes of another scope in place."""
        with contextlib.suppress(NetlinkError):
            self._netlink.route("replace", dst=target, family=family, proto=PROTOCOL, **to)
            self._remove_others(family, target, to)
            return
        self._remove_others(family, target, {})
        try:
            self._netlink.route("replace", dst=target, family=family, proto=PROTOCOL, **to)
        except NetlinkError as error:
            raise Retryable(Reason.INTERNAL, f"route {target} {to}: {error}") from error

    def _remove_others(self, family: int, target: str, keep: dict[str, object]) -> None:
        ip, prefix = target.split("/")
        for route in self._netlink.get_routes(family=family, dst=ip, dst_len=int(prefix)):
            if route["dst_len"] != int(prefix) or route.get_attr("RTA_DST") != ip:
                continue
            if route["type"] != 1 or route.get_attr("RTA_TABLE") != 254:  # unicast, main table
                continue
            same = route.get_attr("RTA_GATEWAY") == keep.get("gateway") and (
                "oif" not in keep or route.get_attr("RTA_OIF") == keep["oif"]
            )
            if keep and same:
                continue
            with contextlib.suppress(NetlinkError):
                self._netlink.route(
                    "del",
                    dst=target,
                    family=family,
                    oif=route.get_attr("RTA_OIF"),
                    scope=route["scope"],
                    proto=route["proto"],
                )

    def remove(self, ip: str) -> None:
        """Removes our route to ``ip``; routes of others stay."""
        with self._lock, contextlib.suppress(NetlinkError):
            self._host.call(lambda: self._delete(ip))

    def _delete(self, ip: str) -> None:
        family, target = self._family(ip)
        self._netlink.route("del", dst=target, family=family, proto=PROTOCOL)
        neighbours.stand_back(self._netlink, ip)

    def list(self) -> tuple[HostRoute, ...]:
        """All our routes."""
        with self._lock:
            return self._host.call(self._list)

    def _list(self) -> tuple[HostRoute, ...]:
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._netlink.get_routes(family=family, proto=PROTOCOL):
                if route["proto"] != PROTOCOL or not route.get_attr("RTA_DST"):
                    continue
                gateway = route.get_attr("RTA_GATEWAY")
                name = None
                if gateway is None:
                    links = self._netlink.get_links(route.get_attr("RTA_OIF"))
                    name = links[0].get_attr("IFLA_IFNAME") if links else None
                found.append(HostRoute(ip=route.get_attr("RTA_DST"), interface=name, via=gateway))
        return tuple(found)
