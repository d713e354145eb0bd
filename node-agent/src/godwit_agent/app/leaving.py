"""The pod that leaves: each method is one line of 'The switch', made of ports.

After ``prepare`` the freeze is ``hold_handshakes``, ``freeze``, ``close_door``,
``dump`` beside ``send_changes``, ``send_images``. At any moment before the
commit the way back is ``release_dump``, ``thaw``, ``open_door``,
``replay_here``, ``discard``. All of it may be repeated, and works on a pod
that this process has found frozen.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from godwit_agent.app.model import PeerNode
from godwit_agent.app.outlet import Outlet
from godwit_agent.hostops.model import (
    Container,
    Extent,
    Moment,
    Outgoing,
    Packet,
    Piece,
    PodState,
    RoundStats,
    Sandbox,
)
from godwit_agent.hostops.ports import (
    FrozenMemory,
    GatedDump,
    HeldConnections,
    Host,
    PodNetwork,
    SourceFiles,
    SourceMemory,
    UnreadDatagrams,
)
from godwit_api.errors import Aborted, GodwitError, Retryable
from godwit_api.reasons import Reason

_GATE_TIMEOUT_S = 20.0
_FREEZE_TIMEOUT_S = 2.0
_FORGOTTEN_TIMEOUT_S = 3.0


class Leaving:
    """One attempt's hold on the source pod."""

    def __init__(
        self,
        host: Host,
        migration_uid: str,
        state: PodState,
        ips: tuple[str, ...],
        own_address: str,
    ) -> None:
        self._host = host
        self._uid = migration_uid
        self.state = state
        self._ips = ips
        self._own_address = own_address
        self._ids = tuple(container.id for container in state.containers)
        self._memory: SourceMemory | None = None
        self._files: SourceFiles | None = None
        self._files_last: RoundStats | None = None
        self._frozen: FrozenMemory | None = None
        self._frozen_lock = threading.Lock()
        self._bootstrap: dict[tuple[str, str], bytes] = {}
        self._network: PodNetwork | None = None
        self._unread: UnreadDatagrams | None = None
        self._connections: HeldConnections | None = None
        self._dumps: dict[str, GatedDump] = {}
        self._began_s = 0.0
        self._used_s: dict[str, float] = {}  # CPU time of each container when the copy began
        self._throttled = False
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="changes")
        self._syn_ns = self._freeze_ns = 0
        self._handed_out: Packet | None = None  # the last of them
        self._dropped: Moment | None = None
        self._lifted: Moment | None = None

    @property
    def containers(self) -> tuple[str, ...]:
        return tuple(container.name for container in self.state.containers)

    # copying

    def start_over(self) -> None:
        """Forgets what has been copied: the next round sends everything."""
        self._close_copies()
        self._memory = self._host.copies.memory(self.state)
        self._files = self._host.copies.files(self.state)
        self._files_last = None
        self._began_s = time.monotonic()
        used = self._host.throttles.used_seconds
        self._used_s = {one.id: used(one) for one in self.state.containers}

    def copy_round(
        self, outlet: Outlet, cancelled: threading.Event, *, files: bool = True
    ) -> RoundStats:
        """One pass over memory and ``files`` while the pod runs. Without: theirs of the last pass
        are reported, since as much may be left."""
        assert self._memory
        assert self._files
        if outlet.takes_shared and self._memory.announce(outlet):
            outlet.sync()
        memory = self._memory.round(outlet, cancelled.is_set)
        if files or self._files_last is None:
            self._files_last = self._files.round(outlet, cancelled.is_set)
            self._send_bootstrap(outlet)
        those = self._files_last
        return RoundStats(
            dirty_bytes=memory.dirty_bytes + those.dirty_bytes,
            copied_bytes=memory.copied_bytes + those.copied_bytes,
            duration_us=memory.duration_us + those.duration_us,
            since_us=memory.since_us,
            parts_us={**memory.parts_us, **those.parts_us},
            processes=memory.processes,
            freeze_us=memory.freeze_us + those.freeze_us,
            carried_bytes=memory.carried_bytes,
            bound_bytes=memory.bound_bytes + those.dirty_bytes,
        )

    def throttle(self, share: float) -> None:
        """The pod gets ``share`` of the CPU time that it has used since the copy began, until
        it is frozen or the copy is given up."""
        took = max(time.monotonic() - self._began_s, 1e-3)
        for one in self.state.containers:
            if not self._throttled:
                used = self._host.throttles.used_seconds(one) - self._used_s.get(one.id, 0.0)
                self._used_s[one.id] = used / took  # from here on: CPUs
        self._throttled = True
        for one in self.state.containers:
            self._host.throttles.limit(one, self._used_s[one.id] * share)

    def _send_bootstrap(self, outlet: Outlet) -> None:
        assert self._memory
        for container, name, content in self._memory.bootstrap():
            if self._bootstrap.get((container, name)) != content:
                outlet.image(container, name, content)
                self._bootstrap[container, name] = content

    # guard

    def guard(self, migration_epoch: int, deadline: int) -> None:
        """Kills are swallowed from now on, and the processes leave the kubelet's cgroups."""
        ids = (*self._ids, self.state.sandbox.id)
        self._host.hooks.guard(ids, self._uid, migration_epoch, deadline)
        for member in self._members():
            self._host.cgroups.guard(member)

    def _members(self) -> tuple[Container | Sandbox, ...]:
        return (*self.state.containers, self.state.sandbox)

    def lift_guard(self, *, back: bool) -> None:
        """``back``: the processes return to the kubelet's cgroups first."""
        if back:
            for member in self._members():
                self._host.cgroups.unguard(member)
        self._host.hooks.unguard((*self._ids, self.state.sandbox.id))

    # before the freeze

    def require_processes(self) -> None:
        """``Aborted(SourceExited)``."""
        if ended := self._host.pods.ended(self.state):
            message = f"container {', '.join(ended)}: its process has ended"
            raise Aborted(Reason.SOURCE_EXITED, message)

    def prepare(self, *, post_copy: bool = False) -> None:
        """CRIU waits at its gate, the capture runs. ``Aborted(SourceExited)``."""
        self.require_processes()
        self._open_network()
        self._host.routes.prepare(self._ips)
        self._connections = self._connections or self._host.connections.watch(self._ips)
        self._host.stores.create_source(self._uid)
        for container in self.state.containers:
            self._dumps[container.name] = self._host.dumps.prepare(
                container, self._uid, post_copy=post_copy
            )
        for name, dump in self._dumps.items():
            dump.wait_waiting(_GATE_TIMEOUT_S)
            if self._memory:
                dump.leave_out(self._memory.shared(name))
        self._workers.submit(int).result()  # its thread exists before the freeze

    def discard(self) -> None:
        """Undoes ``prepare``; what no longer exists is no error."""
        for dump in self._dumps.values():
            dump.kill()
        self._dumps.clear()
        unread, self._unread = self._unread, None
        if unread:
            unread.close()
        network, self._network = self._network, None
        if network:
            network.close()
        connections, self._connections = self._connections, None
        if connections:
            connections.close()

    # the freeze

    def hold_handshakes(self) -> None:
        assert self._network
        self._syn_ns = self._network.hold_syns()

    def freeze(self) -> None:
        """CRIU would wait for threads of a process that has ended: ``Aborted(SourceExited)``."""
        self._freeze_ns = self._host.cgroups.freeze(self._ids, _FREEZE_TIMEOUT_S)
        self.require_processes()

    def close_door(self) -> None:
        assert self._network
        self._dropped = self._network.drop()

    def dump(self, timeout_s: float) -> None:
        for dump in self._dumps.values():
            dump.open_gate()
        for dump in self._dumps.values():
            dump.wait_dumped(timeout_s)

    def send_changes(
        self,
        outlet: Outlet,
        allowance: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundStats:
        """Pages and files written since the last round; runs beside ``dump``. ``allowance``: of
        a post-copy, see ``SourceMemory.final``. ``cancelled``: the freeze has lasted too long,
        also where there is nothing to send that would fail."""
        assert self._memory
        assert self._files
        files = self._workers.submit(self._files.final, outlet, cancelled)
        try:
            memory = self._memory.final(outlet, allowance, cancelled)
        finally:
            failure = files.exception()
        if failure:
            raise failure
        return memory

    def renew_connections(self) -> tuple[int, int]:
        """(kept, lost); the most of them beside ``dump``, the last ones with the route."""
        return self._connections.renew() if self._connections else (0, 0)

    def find_unread(self) -> None:
        """Datagrams that lie in sockets; beside ``dump``, which leaves them out."""
        if self._unread is None:
            self._unread = self._host.datagrams.find(self.state)

    def outgoing(self) -> tuple[Outgoing, ...]:
        """What the pod has opened to translated addresses; after ``renew_connections``."""
        return self._connections.outgoing() if self._connections else ()

    def send_images(self, outlet: Outlet, *, moving: bool) -> None:
        for container, dump in self._dumps.items():
            for name, content in dump.images(moving=moving):
                outlet.image(container, name, content)

    def packets(self) -> tuple[Packet, ...]:
        """What arrived since the freeze, or lies unread in a socket, and has not been handed out
        yet. After the commit only."""
        if self._network is None:
            return ()
        frozen = Moment(self._freeze_ns, self._freeze_ns)
        found = self._network.held(syn_since_ns=self._syn_ns, since=frozen)
        # by their order: the times of two processors may be in another one
        if self._handed_out in found:
            found = found[found.index(self._handed_out) + 1 :]
        if found:
            self._handed_out = found[-1]
        unread, self._unread = self._unread, None
        if unread is None:
            return found
        return unread.before(found, self._dropped.after_ns if self._dropped else 0)

    # the way back

    def release_dump(self) -> None:
        """CRIU lets go; sockets leave repair mode."""
        if self._dumps:
            failures = [error for dump in self._dumps.values() if (error := _try(dump.reject))]
            if failures:
                raise failures[0]
            self._dumps.clear()
            return
        for container in self.state.containers:
            self._host.dumps.recover(container, self._uid)

    def thaw(self) -> None:
        self._host.cgroups.thaw(self._ids)

    def open_door(self) -> None:
        if self._network:
            self._lifted = self._network.lift()
        else:
            self._host.networks.reset(self.state.sandbox.netns)

    def replay_here(self) -> None:
        if self._network and self._dropped:
            held = self._network.held(
                syn_since_ns=self._syn_ns, since=self._dropped, until=self._lifted
            )
            self._network.inject(held)

    # after the commit

    def give_away(self, target: PeerNode) -> None:
        """Not when the target is this node: there the copy's own route takes over."""
        if target.address != self._own_address:
            for ip in self._ips:
                # the operator has looked that there is one
                if address := target.address_for(ip):
                    self._host.routes.via(ip, address)
        self.renew_connections()
        if self._connections:
            self._connections.let_go()

    def fall_silent(self) -> None:
        """On a bridge whoever asks for the pod's link address must hear of the new one only."""
        if self._network:
            with contextlib.suppress(GodwitError, OSError):
                self._network.fall_silent()

    def hold_address(self) -> None:
        """Only where an address comes from: elsewhere this node's IPAM never had it."""
        pools = self._host.probe.facts().ip_pools
        for ip in self._ips:
            address = ipaddress.ip_address(ip)
            if not pools or any(address in ipaddress.ip_network(pool) for pool in pools):
                self._host.addresses.hold(ip, self.state.uid)

    def read(self, piece: Piece) -> Sequence[Extent]:
        """Memory of the frozen tree; several calls at a time."""
        with self._frozen_lock:
            if self._frozen is None:
                self._frozen = self._host.copies.frozen(self.state)
            frozen = self._frozen
        return frozen.read(piece)

    def hold(self) -> None:
        """The dumped tree stands for long: not by CRIU alone, which has thawed its cgroup, and
        without which it would run. For ``kill`` with ``held``."""
        self._host.cgroups.freeze(self._ids, _FREEZE_TIMEOUT_S)

    def kill(self, *, held: bool = False) -> None:
        """Ends the frozen tree behind its closed door, and CRIU with it."""
        if held:
            # The signal comes before the thaw, so none of them runs again, whether there is a
            # CRIU or not. One that traces them has to let go before they end: not waited for.
            with contextlib.suppress(Retryable):
                self._host.cgroups.kill(self._ids, timeout_s=0.0)
        for container in self.state.containers:
            dump = self._dumps.get(container.name)
            if dump:
                dump.finish()
            else:
                self._host.dumps.reap(container, self._uid)
        self._host.cgroups.kill(self._ids)
        # With its pause process gone the kubelet tears the sandbox down at once. But not before
        # the shim has forgotten the containers: told to end while it knows one, it stays for ever.
        self._host.pods.wait_forgotten(self._ids, _FORGOTTEN_TIMEOUT_S)
        self._host.cgroups.kill((self.state.sandbox.id,))
        self._dumps.clear()

    def clean(self) -> None:
        """Images of a dump that nobody needs any more."""
        self._host.stores.destroy_source(self._uid)

    def close(self) -> None:
        """Leaves nothing in the processes, keeps no thread."""
        self._close_copies()
        with self._frozen_lock:
            frozen, self._frozen = self._frozen, None
        if frozen:
            frozen.close()
        self._workers.shutdown(wait=False)

    def _close_copies(self) -> None:
        memory, self._memory = self._memory, None
        files, self._files = self._files, None
        self._bootstrap.clear()
        if self._throttled:
            for one in self.state.containers:
                self._host.throttles.lift(one)
            self._throttled = False
        if memory:
            memory.close()
        if files:
            files.close()

    def _open_network(self) -> None:
        link = self.state.link
        assert link, "CheckSource refuses a pod without an interface"
        if self._network is None:
            self._network = self._host.networks.open(
                self.state.sandbox.netns,
                link.interface,
                link.host_interface,
                link.pod_mac,
                link.host_mac,
            )


def _try(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except (GodwitError, OSError) as error:
        return error
    return None
