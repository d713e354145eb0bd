"""A masqueraded connection when the interface it first left by goes away."""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.net.connections import HeldConnections, HostConnections
from godwit_agent.hostops.net.netns import NetnsThread

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(
        not (shutil.which("ip") and shutil.which("nft")), reason="needs iproute2 and nftables"
    ),
]
POD = "10.79.2.2"
SERVICE = "10.79.9.9"
ELSEWHERE = "10.79.9.8"
# The next packet without an entry goes to another server, where nobody knows the connection.
_ANOTHER_SERVER = """
ip netns exec $R nft flush chain ip nat prerouting
ip netns exec $R nft add rule ip nat prerouting ip daddr 10.79.9.8 dnat to 10.79.1.1
"""

_SETUP = """
for n in $C $R $P; do
  ip netns add $n; ip -n $n link set lo up
  ip netns exec $n sysctl -qw net.ipv6.conf.default.accept_dad=0
done
ip -n $R link add c0 type veth peer name eth0 netns $C
ip -n $R link add old type veth peer name eth0 netns $P
ip -n $R link add new type veth peer name eth1 netns $P
for l in c0 old new; do ip -n $R link set $l up; done
ip -n $C address add 10.79.1.2/24 dev eth0; ip -n $C link set eth0 up
ip -n $R address add 10.79.1.1/24 dev c0; ip -n $C route add default via 10.79.1.1
ip -n $P address add 10.79.2.2/32 dev eth0; ip -n $P link set eth0 up; ip -n $P link set eth1 up
ip -n $R address add 10.79.2.1/32 dev old; ip -n $R address add 10.79.3.1/32 dev new
ip -n $P route add 10.79.2.1 dev eth0; ip -n $P route add default via 10.79.2.1 dev eth0
ip -n $R route add 10.79.2.2 dev old
ip netns exec $R sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
ip netns exec $R nft -f - <<END
table ip nat {
  chain prerouting {
    type nat hook prerouting priority -100;
    ip daddr 10.79.9.9 dnat to 10.79.2.2
    ip daddr 10.79.9.8 dnat to 10.79.1.2
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    ip saddr 10.79.1.0/24 masquerade
  }
}
END
"""
_MOVE = """
ip -n $P route del default; ip -n $P address del 10.79.2.2/32 dev eth0
ip -n $P address add 10.79.2.2/32 dev eth1
ip -n $P route add 10.79.3.1 dev eth1; ip -n $P route add default via 10.79.3.1 dev eth1
ip -n $R route replace 10.79.2.2 dev new
ip -n $R link del old
"""


def ipv6(text: str) -> str:
    """The same network of IPv6 addresses."""
    text = re.sub(r"10\.79\.(\d)\.(\d+)", r"fd79:\1::\2", text)
    text = text.replace("/24", "/64").replace("/32", "/128").replace("ip -n", "ip -6 -n")
    text = re.sub(r"(?m)(address add \S+ dev \w+)", r"\1 nodad", text)
    return re.sub(r"\bip (nat|daddr|saddr)\b", r"ip6 \1", text)


@dataclass
class Scene:
    """Client, translating node and pod; the pod has a second link to be moved to."""

    names: dict[str, str]
    family: socket.AddressFamily

    def at(self, address: str) -> str:
        return ipv6(address) if self.family is socket.AF_INET6 else address

    def shell(self, script: str) -> None:
        script = self.at(script)
        done = subprocess.run(
            ["sh", "-ec", script], env=os.environ | self.names, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def forget_all(self) -> None:
        """Empties the connection table."""
        node = NetnsThread(f"/run/netns/{self.names['R']}")
        with node.call(NFCTSocket) as table:
            node.call(table.flush)
        node.close()

    @property
    def layout(self) -> Layout:
        return replace(Layout(), host_netns=f"/run/netns/{self.names['R']}")

    @functools.cached_property
    def agent(self) -> HostConnections:
        return HostConnections(self.layout)

    @contextlib.contextmanager
    def watching(self, ip: str = POD) -> Iterator[HeldConnections]:
        """As an agent does it, from before the freeze until after it."""
        held = self.agent.watch((self.at(ip),))
        try:
            yield held
        finally:
            held.close()

    def echo(self, kind: socket.SocketKind) -> contextlib.AbstractContextManager[socket.socket]:
        """A client's socket to the Service, answered by the pod."""
        return self._connected(kind, "C", SERVICE, "P", POD)

    def abroad(self) -> contextlib.AbstractContextManager[socket.socket]:
        """The pod's socket to a Service whose server is the client's node."""
        return self._connected(socket.SOCK_STREAM, "P", ELSEWHERE, "C", "10.79.1.2")

    @contextlib.contextmanager
    def _connected(
        self, kind: socket.SocketKind, asks: str, service: str, answers: str, address: str
    ) -> Iterator[socket.socket]:
        """A socket in the one namespace, to a Service that is answered in the other."""
        server = NetnsThread(f"/run/netns/{self.names[answers]}")
        client = NetnsThread(f"/run/netns/{self.names[asks]}")
        listener = server.call(lambda: socket.socket(self.family, kind))
        listener.bind((self.at(address), 6379))
        asking = client.call(lambda: socket.socket(self.family, kind))
        asking.settimeout(5)
        if kind is socket.SOCK_STREAM:
            listener.listen()
        thread = threading.Thread(target=_answer, args=(listener, kind), daemon=True)
        thread.start()
        try:
            asking.connect((self.at(service), 6379))
            yield asking
        finally:
            asking.close()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(5)
            server.close()
            client.close()


def _answer(listener: socket.socket, kind: socket.SocketKind) -> None:
    """Each byte comes back; a datagram with the port it came from."""
    with contextlib.suppress(OSError):
        if kind is socket.SOCK_STREAM:
            with listener.accept()[0] as peer:
                while data := peer.recv(100):
                    peer.sendall(data)
            return
        while (got := listener.recvfrom(100))[0]:
            listener.sendto(got[0] + str(got[1][1]).encode(), got[1])


def ask(asking: socket.socket) -> bytes:
    asking.sendall(b"?")
    return asking.recv(100)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    token = secrets.token_hex(3)
    made = Scene({name: f"gwct-{token}-{name.lower()}" for name in "CRP"}, request.param)
    try:
        made.shell(_SETUP)
        yield made
    finally:
        for name in made.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.parametrize("late", [False, True])
def test_tcp_connection_outlives_the_interface(scene: Scene, late: bool) -> None:
    """``late``: opened after the table has been read, before the freeze."""
    with contextlib.ExitStack() as stack:
        if late:
            held = stack.enter_context(scene.watching())
        asking = stack.enter_context(scene.echo(socket.SOCK_STREAM))
        assert ask(asking) == b"?"
        if not late:
            held = stack.enter_context(scene.watching())
        assert held.renew() == (1, 0)
        scene.shell(_MOVE)
        assert ask(asking) == b"?"


def test_twice(scene: Scene) -> None:
    """A rolled back switch is tried again; the pod moves there and back."""
    with scene.echo(socket.SOCK_STREAM) as asking:
        for _ in range(2):
            assert ask(asking) == b"?"
            with scene.watching() as held:
                assert held.renew() == (1, 0)
        scene.shell(_MOVE)
        assert ask(asking) == b"?"


def test_udp_client_keeps_its_port(scene: Scene) -> None:
    with scene.echo(socket.SOCK_DGRAM) as asking:
        before = ask(asking)
        with scene.watching() as held:
            assert held.renew() == (1, 0)
            scene.shell(_MOVE)
        assert ask(asking) == before


def test_closed_connection_is_no_loss(scene: Scene) -> None:
    with scene.echo(socket.SOCK_STREAM) as asking:
        assert ask(asking) == b"?"
        with scene.watching() as held:
            scene.forget_all()
            assert held.renew() == (0, 0)


def test_without_it_the_connection_is_reset(scene: Scene) -> None:
    """Else the tests above would prove nothing."""
    with scene.echo(socket.SOCK_STREAM) as asking:
        assert ask(asking) == b"?"
        scene.shell(_MOVE)
        with pytest.raises(ConnectionResetError):
            ask(asking)


def test_other_pods_and_plain_connections_are_left_alone(scene: Scene) -> None:
    with scene.echo(socket.SOCK_STREAM) as asking:
        assert ask(asking) == b"?"
        for other in ("10.79.2.3", "fd00::1" if scene.family is socket.AF_INET else "198.51.100.1"):
            with scene.watching(other) as held:
                assert held.renew() == (0, 0)
        assert ask(asking) == b"?"


@pytest.mark.parametrize("late", [False, True])
def test_the_pods_own_connection_keeps_its_server(scene: Scene, late: bool) -> None:
    """The next node has no entry, and would choose another server of the Service."""
    with contextlib.ExitStack() as stack:
        if late:
            held = stack.enter_context(scene.watching())
        asking = stack.enter_context(scene.abroad())
        assert ask(asking) == b"?"
        if not late:
            held = stack.enter_context(scene.watching())
        assert held.renew() == (0, 0)
        (connection,) = held.outgoing()
        assert connection.server == (ipaddress.ip_address(scene.at("10.79.1.2")).packed, 6379)
        scene.forget_all()
        scene.shell(_ANOTHER_SERVER)
        assert held.adopt([connection]) == (1, 0)
        assert held.adopt([connection]) == (1, 0)
        assert ask(asking) == b"?"


def test_without_its_entry_it_is_reset(scene: Scene) -> None:
    with scene.abroad() as asking:
        assert ask(asking) == b"?"
        scene.forget_all()
        scene.shell(_ANOTHER_SERVER)
        with pytest.raises(ConnectionResetError):
            ask(asking)


@pytest.mark.parametrize("watched", [False, True])
def test_a_packet_that_dies_between_the_nodes_ends_no_connection(
    scene: Scene, watched: bool
) -> None:
    """The client repeats its SYN when nobody tells it that the first one went in a circle."""
    client = NetnsThread(f"/run/netns/{scene.names['C']}")
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        if watched:
            stack.enter_context(scene.watching())
        asking = stack.enter_context(client.call(lambda: socket.socket(scene.family)))
        if scene.family is socket.AF_INET6:
            asking.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
        else:
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        asking.settimeout(2.5)
        with pytest.raises(TimeoutError if watched else OSError) as caught:
            asking.connect((scene.at(POD), 6379))
        assert watched or caught.value.errno == errno.EHOSTUNREACH


def test_nobody_elses_connection_is_adopted(scene: Scene) -> None:
    with scene.abroad() as asking:
        assert ask(asking) == b"?"
        with scene.watching() as held, scene.watching("10.79.2.3") as other:
            assert other.outgoing() == ()
            assert other.adopt(held.outgoing()) == (0, 1)


def test_an_agent_that_was_killed_keeps_nobody_from_the_service(scene: Scene) -> None:
    """In the freeze new datagrams to it wait; the next agent ends that for those before it."""
    with scene.echo(socket.SOCK_DGRAM) as asking, contextlib.ExitStack() as stack:
        ask(asking)
        stack.enter_context(scene.watching())
        client = NetnsThread(f"/run/netns/{scene.names['C']}")
        stack.callback(client.close)
        other = stack.enter_context(client.call(lambda: socket.socket(scene.family, asking.type)))
        other.connect((scene.at(SERVICE), 6379))
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(other)
        HostConnections(scene.layout)
        other.settimeout(5)
        assert ask(other)[:1] == b"?"
