"""Routes and reservations of moved addresses: always made to equal what the operator wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from godwit_agent import log
from godwit_agent.app.model import MovedAddress
from godwit_agent.hostops.ports import Host


class Addresses:
    """Level-triggered, but for the addresses of migrations that are not over here: a list
    that the operator wrote before their switch must not take their route or reservation."""

    def __init__(self, host: Host, node: str, moving: Callable[[], frozenset[str]]) -> None:
        self._host = host
        self._node = node
        self._moving = moving
        self._lock = threading.Lock()

    def sync(self, wanted: Sequence[MovedAddress]) -> list[str]:
        """Sets and removes routes; the addresses whose reservation here has ended."""
        with self._lock:
            return self._sync({address.ip: address for address in wanted})

    def _sync(self, wanted: dict[str, MovedAddress]) -> list[str]:
        moving = self._moving()
        routes = {route.ip: route for route in self._host.routes.list()}
        for address in wanted.values():
            route = routes.get(address.ip)
            if address.node == self._node or address.ip in moving:
                continue  # the migration has set the route, or will
            if route is None or route.via != address.node_address:
                self._host.routes.via(address.ip, address.node_address)
                log.info("route", ip=address.ip, via=address.node_address)
        for ip, route in routes.items():
            # that of a pod that is here may be newer than the list
            if ip not in wanted and ip not in moving and route.interface is None:
                self._host.routes.remove(ip)
                log.info("route removed", ip=ip)
        self._host.routes.settle(moving)
        held = [address.ip for address in self._host.addresses.list()]
        released = [ip for ip in held if ip not in wanted and ip not in moving]
        for ip in released:
            self._host.addresses.release(ip)
            log.info("address released", ip=ip)
        return released
