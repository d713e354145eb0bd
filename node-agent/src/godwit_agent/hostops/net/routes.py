"""Host routes of moved addresses, marked with a route protocol number of our own."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterable

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostRoute
from godwit_agent.hostops.net import neighbours
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.net.redirects import Redirects
from godwit_agent.hostops.smallfiles import make_directory, read_json, write_json
from godwit_api.errors import GodwitError, Retryable
from godwit_api.reasons import Reason

# An unassigned value of rtm_protocol (linux/rtnetlink.h): tells our routes from others'.
PROTOCOL = 87


class HostRoutes:
    """The real ``Routes``: works in the host's network namespace.

    Everything runs on one thread that lives there: pyroute2 opens a socket for each thread that
    calls it, in the namespace of that thread.
    """

    def __init__(self, layout: Layout) -> None:
        self._behind = layout.local(layout.run_dir) / "routes"
        make_directory(self._behind)
        self._lock = threading.Lock()
        self._host = NetnsThread(layout.host_netns)
        self._netlink = self._host.call(IPRoute)
        self._redirects = Redirects(self._host, [route.ip for route in self.list()])

    def close(self) -> None:
        """Routes stay."""
        self._redirects.close()
        self._host.call(self._netlink.close)
        self._host.close()

    @staticmethod
    def _family(ip: str) -> tuple[int, str]:
        address = ipaddress.ip_address(ip)
        if address.version == 4:
            return socket.AF_INET, f"{ip}/32"
        return socket.AF_INET6, f"{ip}/128"

    def prepare(self, ips: Iterable[str]) -> None:
        """What a change of route needs and may be slow. ``Retryable(Internal)``."""
        with self._lock:
            self._redirects.suppress(ips)

    def settle(self, moving: Iterable[str]) -> None:
        """Takes back what is prepared for addresses that are not ``moving`` and have no route.
        ``Retryable(Internal)``."""
        with self._lock:
            known = self._redirects.moved.difference(moving)
            if known and (over := known - {route.ip for route in self._host.call(self._list)}):
                self._redirects.allow(over)

    def local(self, ip: str, host_interface: str, pod_mac: str) -> None:
        """The pod with ``ip`` is behind ``host_interface`` and has the link address ``pod_mac``."""
        with self._lock:
            self._no_redirects(ip)
            self._host.call(lambda: self._local(ip, host_interface, pod_mac))

    def _local(self, ip: str, host_interface: str, pod_mac: str) -> None:
        family, target = self._family(ip)
        found = self._netlink.get_links(ifname=host_interface)
        if not found:
            raise Retryable(Reason.INTERNAL, f"no interface {host_interface} on this node")
        index = neighbours.through(found[0])
        if index != found[0]["index"]:
            write_json(self._behind / ip, {"interface": host_interface})
        neighbours.learn(self._netlink, ip, index, pod_mac)
        self._replace(family, target, oif=index, scope=253 if family == 2 else 0)
        neighbours.stand_back(self._netlink, ip, pod_mac)

    def via(self, ip: str, node_address: str) -> None:
        """The pod with ``ip`` is on the node with ``node_address``."""
        with self._lock:
            self._no_redirects(ip)
            self._host.call(lambda: self._via(ip, node_address))

    def _via(self, ip: str, node_address: str) -> None:
        family, target = self._family(ip)
        self._replace(family, target, gateway=node_address)
        (self._behind / ip).unlink(missing_ok=True)
        neighbours.stand_in(self._netlink, ip)

    def _no_redirects(self, ip: str) -> None:
        """Never raises: a process may be waiting for its route."""
        if ip not in self._redirects.moved:
            with contextlib.suppress(GodwitError):
                self._redirects.suppress((ip,))

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
        (self._behind / ip).unlink(missing_ok=True)
        family, target = self._family(ip)
        # 255 (RT_SCOPE_NOWHERE): of whatever scope; IPv6 has none
        scope = {"scope": 255} if family == socket.AF_INET else {}
        self._netlink.route("del", dst=target, family=family, proto=PROTOCOL, **scope)
        neighbours.stand_back(self._netlink, ip, None)

    def list(self) -> tuple[HostRoute, ...]:
        """All our routes. A route over a bridge does not end with the pod's interface, as others
        do: it is listed with neither interface nor node then."""
        with self._lock:
            return self._host.call(self._list)

    def _list(self) -> tuple[HostRoute, ...]:
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._netlink.get_routes(family=family, proto=PROTOCOL):
                if route["proto"] != PROTOCOL or not route.get_attr("RTA_DST"):
                    continue
                gateway = route.get_attr("RTA_GATEWAY")
                ip = route.get_attr("RTA_DST")
                name = None if gateway else self._interface(ip, route.get_attr("RTA_OIF"))
                found.append(HostRoute(ip=ip, interface=name, via=gateway))
        return tuple(found)

    def _interface(self, ip: str, index: int) -> str | None:
        """The host's end of the pod's interface, while it is there."""
        behind = read_json(self._behind / ip)
        with contextlib.suppress(NetlinkError):
            links = (
                self._netlink.get_links(ifname=behind["interface"])
                if behind
                else self._netlink.get_links(index)
            )
            for link in links:
                return str(link.get_attr("IFLA_IFNAME"))
        return None
