"""Network namespaces: one per node, one for what is outside the cluster, a bridge between.

``ext`` holds the bridge and routes pods and Services to the nodes, as a router
of a data centre does. Nothing is added to the machine's own namespace.
"""

from __future__ import annotations

from pathlib import Path

from godwit_testbed import shell
from godwit_testbed.paths import Place

_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
}


def inside(netns: str, *argv: str) -> list[str]:
    """Command line that runs in a network namespace and nowhere else.

    ``ip netns exec`` is avoided: it mounts a new /sys over the caller's.
    """
    return ["nsenter", f"--net=/run/netns/{netns}", "--", *argv]


def node_address(place: Place, node: str) -> str:
    """Address of a node: ``cp`` is .10, ``n1`` .11 and so on."""
    number = 10 if node == "cp" else 10 + int(node[1:])
    return f"{place.network}.0.{number}"


def pod_cidr(place: Place, node: str) -> str:
    """Addresses of the pods of a worker."""
    return f"{place.network}.{128 + int(node[1:])}.0/24"


def node_address6(place: Place, node: str) -> str:
    """IPv6 address of a node, with the same number."""
    return f"{place.network6}::{node_address(place, node).rpartition('.')[2]}"


def pod_cidr6(place: Place, node: str) -> str:
    """IPv6 addresses of the pods of a worker."""
    return f"{place.network6}:{0x80 + int(node[1:]):x}::/64"


def create(place: Place, workers: list[str]) -> None:
    """Make all namespaces, links, addresses and routes."""
    ext = place.netns("ext")
    _namespace(ext)
    shell.run("ip", "-n", ext, "link", "add", "br0", "type", "bridge")
    shell.run("ip", "-n", ext, "link", "set", "br0", "up")
    shell.run("ip", "-n", ext, "addr", "add", f"{place.network}.0.1/24", "dev", "br0")
    for node in ["cp", *workers]:
        attach(place, node, workers)
    for node in workers:
        _route(place, "ext", node)
    # A client outside reaches Services through the first worker's kube-proxy.
    shell.run(
        "ip", "-n", ext, "route", "add", place.service_cidr, "via", node_address(place, workers[0])
    )


def attach(place: Place, node: str, workers: list[str]) -> None:
    """A new namespace for a node, with nothing but its link, its address and its routes."""
    ext, netns = place.netns("ext"), place.netns(node)
    if Path(f"/run/netns/{netns}").exists():
        # its end of the link goes with the namespace only when nobody holds that any more
        shell.run("ip", "-n", ext, "link", "del", f"v-{node}", check=False)
        shell.run("ip", "netns", "del", netns)
    _namespace(netns)
    words = ["type", "veth", "peer", "name", "eth0", "netns", netns]
    shell.run("ip", "-n", ext, "link", "add", f"v-{node}", *words)
    shell.run("ip", "-n", ext, "link", "set", f"v-{node}", "master", "br0", "up")
    shell.run("ip", "-n", netns, "link", "set", "eth0", "up")
    shell.run("ip", "-n", netns, "addr", "add", f"{node_address(place, node)}/24", "dev", "eth0")
    shell.run("ip", "-n", netns, "route", "add", "default", "via", f"{place.network}.0.1")
    for other in workers:
        if other != node:
            _route(place, node, other)


def _route(place: Place, here: str, worker: str) -> None:
    """``here`` reaches the pods of a worker."""
    to = ["via", node_address(place, worker)]
    shell.run("ip", "-n", place.netns(here), "route", "add", pod_cidr(place, worker), *to)


def create6(place: Place, workers: list[str]) -> None:
    """IPv6 addresses and routes beside those of ``create``."""
    for where in ["ext", "cp", *workers]:
        attach6(place, where, workers)
    first = node_address6(place, workers[0])
    _ip6(place, "ext", "route", "add", place.service_cidr6, "via", first)


def attach6(place: Place, where: str, workers: list[str]) -> None:
    """IPv6 addresses and routes of one namespace, beside those of ``attach``."""
    netns, outside = place.netns(where), f"{place.network6}::1"
    for key in ("all", "default"):
        shell.run(*inside(netns, "sysctl", "-qw", f"net.ipv6.conf.{key}.forwarding=1"))
    if where == "ext":
        _ip6(place, where, "addr", "add", f"{outside}/64", "dev", "br0", "nodad")
    else:
        address = node_address6(place, where)
        _ip6(place, where, "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
        _ip6(place, where, "route", "add", "default", "via", outside)
    for node in workers:
        if node != where:
            to = ["via", node_address6(place, node)]
            _ip6(place, where, "route", "add", pod_cidr6(place, node), *to)


def _ip6(place: Place, where: str, *words: str) -> None:
    shell.run("ip", "-6", "-n", place.netns(where), *words)


def _namespace(name: str) -> None:
    shell.run("ip", "netns", "add", name)
    shell.run("ip", "-n", name, "link", "set", "lo", "up")
    for key, value in _SYSCTLS.items():
        shell.run(*inside(name, "sysctl", "-qw", f"{key}={value}"))


def remove(place: Place) -> None:
    """Delete every namespace of the testbed; links and routes go with them."""
    for file in sorted(Path("/run/netns").glob(f"gtb-{place.name}-*")):
        rest = file.name.removeprefix(f"gtb-{place.name}-")
        if "-" not in rest:  # another testbed may have this one's name as its beginning
            shell.run("ip", "netns", "del", file.name, check=False)
