"""No ICMP redirects about addresses that have moved.

A node that sends a packet on over the interface it came by tells its sender of the shorter way
(``ip_forward``, net/ipv4/ip_forward.c; ``ip6_forward``, net/ipv6/ip6_output.c). For a pod that has
moved here that is its interface on this node's bridge, and it ends with the next move: a neighbour
on the bridge would go on sending there for five minutes (``ip_rt_gc_timeout``), whatever this node
says. Or it is the node where the pod runs now, and that may be drained and shut down next. Without
redirects all packets come through this node, which knows the way.

Whether a sender believes one is a matter of chance: a TCP socket does not while its process is in a
system call with it (``tcp_v4_err``).
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable

from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.net.nft import Nft, removal
from godwit_api.errors import GodwitError

TABLE = "godwit_redirects"  # the installer removes it with the last of Godwit

# In both families the address that a redirect is about comes after 24 bytes of the message: in ICMP
# it is the destination of the packet that is quoted (RFC 792), in neighbour discovery a field of
# its own (RFC 4861, 4.5).
_SETS = {
    4: ("moved4", "@th,192,32", "icmp type redirect"),
    6: ("moved6", "@th,192,128", "icmpv6 type nd-redirect"),
}
_MAKE = (
    f"add table inet {TABLE}\n"
    + "".join(f"add set inet {TABLE} {name} {{ typeof {at}; }}\n" for name, at, _ in _SETS.values())
    + f"add chain inet {TABLE} output {{ type filter hook output priority 0; }}\n"
    + "".join(
        f"add rule inet {TABLE} output {kind} {at} @{name} drop\n"
        for name, at, kind in _SETS.values()
    )
)


class Redirects:
    """This node sends none about the addresses in ``moved``; no table is there without any.

    Works in the network namespace of ``host``. Every change is one transaction.
    """

    def __init__(self, host: NetnsThread, moved: Iterable[str]) -> None:
        """``moved`` takes the place of what an agent before this one has left."""
        self._nft = Nft(host)
        self.moved = frozenset[str]()
        with contextlib.suppress(GodwitError):  # the next change finds it, too
            self._set(frozenset(moved))

    def close(self) -> None:
        """The table stays."""
        self._nft.close()

    def suppress(self, ips: Iterable[str]) -> None:
        """Of these, too. The whole is made anew, in case another program has flushed it."""
        self._set(self.moved.union(ips))

    def allow(self, ips: Iterable[str]) -> None:
        """Of these no longer."""
        self._set(self.moved.difference(ips))

    def _set(self, moved: frozenset[str]) -> None:
        """``Retryable(Internal)``: all is as it was."""
        elements = [
            f"add element inet {TABLE} {_SETS[address.version][0]} {{ {int(address):#x} }}\n"
            for address in map(ipaddress.ip_address, sorted(moved))
        ]
        self._nft.run("".join((removal(TABLE), *((_MAKE, *elements) if elements else ()))))
        self.moved = moved
