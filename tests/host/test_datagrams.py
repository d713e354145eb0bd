"""What a frozen pod's UDP sockets have received is received once more by those of its copy."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from godwit_agent.hostops import procs
from godwit_agent.hostops.model import Container, HostPath, Moment, PodState, Sandbox
from godwit_agent.hostops.net.datagrams import HostDatagrams
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.net.network import HostPodNetwork

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not shutil.which("ip"), reason="needs iproute2"),
]
IP, IP6 = "10.77.2.2", "fd77:2::2"
_SENT = 20 + 3 + 11 + 9  # datagrams of ``Scene.send``, by port
_LARGE = random.Random(1).randbytes(9000)
# One host with two pods of the same addresses: the one that leaves, and its copy.
_SETUP = """
for n in $H $A $B; do
  ip netns add $n; ip -n $n link set lo up
  ip netns exec $n sysctl -qw net.ipv6.conf.default.accept_dad=0
done
ip -n $H address add 10.77.1.1/32 dev lo; ip -n $H address add fd77:1::1/128 dev lo
for n in $A $B; do
  ip -n $H link add $n type veth peer name eth0 netns $n
  ip -n $H link set $n up; ip -n $n link set eth0 up
  ip -n $n address add 10.77.2.2/32 dev eth0; ip -n $n address add fd77:2::2/128 dev eth0 nodad
  ip -n $n route add default dev eth0; ip -n $n -6 route add default dev eth0
done
ip -n $H route add 10.77.2.2 dev $A; ip -n $H -6 route add fd77:2::2 dev $A
ip netns exec $H sysctl -qw net.ipv4.conf.all.proxy_arp=1
"""
_SERVER = """
import json, socket, sys
v4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); v4.bind(("0.0.0.0", 5001))
v4.setsockopt(socket.IPPROTO_IP, 13, 1)
both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); both.bind(("::", 5002))
local = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); local.bind(("127.0.0.1", 5003))
mine = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); mine.bind(("::", 5004))
print("ready", flush=True)
for line in sys.stdin:
    for one in (v4, both, local, mine):
        while True:
            try: data, control, _, who = one.recvmsg(70000, 100, socket.MSG_DONTWAIT)
            except BlockingIOError: break
            more = [item[2].hex() for item in control]
            print(json.dumps([one.getsockname()[1], who[:2], data.hex(), more]))
    print("end", flush=True)
"""


@dataclass
class Scene:
    names: dict[str, str]

    def mac(self, name: str) -> str:
        """Of the pod's end of its link."""
        return self.run("ip", "netns", "exec", self.names[name], "cat",
                        "/sys/class/net/eth0/address").strip()  # fmt: skip

    def run(self, *argv: str) -> str:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    @contextlib.contextmanager
    def server(self, name: str) -> Iterator[subprocess.Popen[str]]:
        argv = ["nsenter", f"--net=/run/netns/{self.names[name]}", sys.executable, "-c", _SERVER]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            try:
                assert child.stdout
                assert child.stdout.readline() == "ready\n"
                yield child
            finally:
                child.kill()

    @contextlib.contextmanager
    def network(self, name: str) -> Iterator[HostPodNetwork]:
        """As an agent opens it."""
        host = f"/run/netns/{self.names['H']}"
        pod = NetnsThread(f"/run/netns/{self.names[name]}")
        made = HostPodNetwork(
            pod, "eth0", self.names[name], self.mac(name), "02:00:00:00:00:01", host_netns=host
        )
        try:
            yield made
        finally:
            made.close()

    def send(self) -> None:
        """From outside and from within; the order of each socket's own is what counts."""
        host = NetnsThread(f"/run/netns/{self.names['H']}")
        inside = NetnsThread(f"/run/netns/{self.names['A']}")
        with (
            host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as four,
            host.call(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as six,
            inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own,
            inside.call(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as own6,
        ):
            four.bind(("10.77.1.1", 4444))
            six.bind(("fd77:1::1", 6666))
            own.bind(("0.0.0.0", 3333))
            own6.bind(("::", 2222))
            four.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
            for number in range(20):
                four.sendto(b"%d" % number, (IP, 5001))
            for payload in (b"", _LARGE[:1473], _LARGE):
                four.sendto(payload, (IP, 5001))
            for number in range(5):
                four.sendto(b"four %d" % number, (IP, 5002))
                six.sendto(b"six %d" % number, (IP6, 5002))
            six.sendto(_LARGE[:5000], (IP6, 5002))
            for number in range(3):
                own.sendto(b"local %d" % number, ("127.0.0.1", 5003))
                own6.sendto(b"mine %d" % number, (IP6, 5004))
                own6.sendto(b"also mine %d" % number, ("::1", 5004))
        host.close()
        inside.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    tag = uuid.uuid4().hex[:6]
    names = {name: f"gd{name.lower()}-{tag}" for name in ("H", "A", "B")}
    try:
        done = subprocess.run(
            ["sh", "-ec", _SETUP], env=os.environ | names, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        yield Scene(names)
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


def freeze(child: subprocess.Popen[str]) -> PodState:
    """It stands still, and what has been sent has arrived."""
    child.send_signal(signal.SIGSTOP)
    while procs.states(child.pid) != {"T"}:
        time.sleep(0.001)
    return pod_of(child.pid)


def pod_of(pid: int) -> PodState:
    path = HostPath("/nowhere")
    container = Container("c", "main", pid, path, path, path, None, {}, (), ())
    return PodState("u", "ns", "n", Sandbox("s", pid, path, 1), (container,), None)


def read(child: subprocess.Popen[str]) -> list[str]:
    """What it has received until now, with senders and traffic classes."""
    assert child.stdin
    assert child.stdout
    child.stdin.write("?\n")
    child.stdin.flush()
    return list(iter(child.stdout.readline, "end\n"))


def test_what_was_unread_is_received_by_the_copy(scene: Scene) -> None:
    """The same as the host delivers it: order, senders, traffic class, payload."""
    with scene.server("A") as server:
        scene.send()
        wanted = read(server)
    assert len(wanted) == _SENT
    with scene.server("A") as server:
        pod = freeze(server)
        scene.send()
        packets = HostDatagrams().find(pod).before((), time.time_ns())
        # nothing is left where it was, so that nobody gets it twice
        assert HostDatagrams().find(pod).before((), time.time_ns()) == ()
        server.send_signal(signal.SIGCONT)
        assert read(server) == []
    with scene.server("B") as copy, scene.network("B") as network:
        assert network.inject(packets, (IP, IP6)) == len(packets)
        assert read(copy) == wanted


def test_a_rollback_finds_every_socket_as_it_was(scene: Scene) -> None:
    with scene.server("A") as server:
        pod = freeze(server)
        scene.send()
        HostDatagrams().find(pod).close()
        server.send_signal(signal.SIGCONT)
        assert len(read(server)) == _SENT


def test_what_was_captured_and_delivered_comes_once(scene: Scene) -> None:
    """Between the freeze and the closing of the door both happens."""
    with scene.server("A") as server, scene.network("A") as network:
        pod = freeze(server)
        begin = network.hold_syns()
        scene.send()
        dropped = network.drop()
        scene.send()
        held = network.held(syn_since_ns=begin, since=Moment(begin, begin))
        packets = HostDatagrams().find(pod).before(held, dropped.after_ns)
    with scene.server("B") as copy, scene.network("B") as there:
        there.inject(packets, (IP, IP6))
        got = read(copy)
    # one of before the door and one of behind it; of fragments nobody knows
    small = [line for line in got if line.startswith("[5001") and len(line) < 100]
    assert len(small) == 2 * 21
    assert set(Counter(small).values()) == {2}
