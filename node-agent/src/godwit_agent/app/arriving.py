"""The pod that arrives: its store, its successor, its restored copy; made of ports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from godwit_agent import log
from godwit_agent.app.stopwatch import Stopwatch
from godwit_agent.hostops.model import (
    Moment,
    Outgoing,
    Packet,
    Place,
    Plan,
    Restored,
    Slot,
    SuccessorNetwork,
)
from godwit_agent.hostops.ports import HeldConnections, Host, MissingPages, PodNetwork, TargetStore
from godwit_api.errors import Aborted, GodwitError, Retryable, Unsafe
from godwit_api.reasons import Reason

_DRAIN_TIMEOUT_S = 5.0


class StoreSink:
    """``transfer.receiver.Sink``: bytes to the store, packets to whom they concern."""

    def __init__(self, store: TargetStore, packet: Callable[[Packet], None]) -> None:
        self.pages = store.pages
        self.zero = store.zero
        self.image = store.image
        self.file = store.file
        self._packet = packet

    def packet(self, at_ns: int, data: memoryview) -> None:
        self._packet(Packet(at_ns, bytes(data)))


class Arriving:
    """One attempt's hold on the target."""

    def __init__(self, host: Host, migration_uid: str, epoch: int, ips: tuple[str, ...]) -> None:
        """``ips``: none for a pod that keeps its native address."""
        self._host = host
        self._uid = migration_uid
        self._epoch = epoch
        self._ips = ips
        self._store: TargetStore | None = None
        self._successor = ""
        self._network: PodNetwork | None = None
        self._connections: HeldConnections | None = None
        self._armed_ns = 0
        self._opened: Moment | None = None
        self._restored: dict[str, Restored] = {}
        self._outgoing: tuple[Outgoing, ...] = ()
        self._places: tuple[Place, ...] = ()

    # store

    def create_store(
        self, containers: tuple[str, ...], memory_bytes: int, places: tuple[Place, ...]
    ) -> None:
        self._places = places
        self._store = self._host.stores.create_target(self._uid, containers, memory_bytes, places)

    def make_places(self) -> None:
        """Directories of the node that are volumes; only once the journal names them."""
        self._host.volumes.make(self._places)

    def reopen(self, successor_uid: str, places: tuple[Place, ...]) -> None:
        """After a restart of the agent."""
        self._places = places
        self._store = self._host.stores.open_target(self._uid)
        self._successor = successor_uid

    def sink(self, packet: Callable[[Packet], None]) -> StoreSink:
        return StoreSink(self._require_store(), packet)

    # successor

    def expect(self, successor_uid: str, plan: Plan) -> None:
        """The hook knows the successor from now on: it restores, or it does not start."""
        slots = self._require_store().slots()
        self._host.hooks.expect(successor_uid, self._uid, self._epoch, self._ips, slots, plan)
        self._successor = successor_uid

    def await_gate(self, timeout_s: float) -> str | None:
        """The successor's native address once all restores wait; None when not all do in time."""

        def look() -> str | None:
            network = self._host.hooks.network(self._successor)
            waiting = network and all(self._waits(slot) for slot in self._slots())
            return network.native_ip if network and waiting else None

        return self._host.hooks.wait(look, timeout_s)

    def charge(self) -> None:
        """Once the successor is there: shared memory that lies here becomes its own to pay for."""
        try:
            self._require_store().charge(self._host.pods.find(self._successor))
        except (GodwitError, OSError) as error:
            log.warning("shared memory stays the agent's", uid=self._uid, error=error)

    def arm(self) -> None:
        """Does what ``restore`` and ``run`` need and may be slow."""
        store = self._require_store()
        store.bind(self._host.pods.find(self._successor))
        store.start_daemons()
        if self._ips:  # else it has its own, which nobody knows yet
            self._host.routes.prepare(self._ips)
            self._connections = self._connections or self._host.connections.watch(self._ips)
        self._armed_ns = self._armed_ns or time.time_ns()
        self._open_network()

    # freeze

    def complete(self, watch: Stopwatch, *, may_miss: bool) -> int:
        """Everything has come, but for what the source has withheld: so many bytes."""
        with watch.part("complete"):
            return self._require_store().complete(may_miss=may_miss).missing_bytes

    @property
    def here(self) -> bool:
        """Whether the store, and with it any copy, is here: not on a node that was restarted."""
        return self._store is not None

    def missing(self) -> MissingPages | None:
        return self._store.missing() if self._store else None

    def restore(
        self, timeout_s: float, watch: Stopwatch, outgoing: tuple[Outgoing, ...] = ()
    ) -> int:
        """All containers, left stopped and checked; the number of their tasks. After
        ``complete``. ``outgoing``: connections that this node translates once the route leads
        here."""
        self._outgoing = outgoing
        deadline = time.monotonic() + timeout_s
        if self._connections:
            with watch.part("connections"):
                self._connections.renew()

        def one(slot: Slot) -> Restored:
            with watch.part(f"criu_{slot.container}"):
                return self._host.restores.restore(slot, max(deadline - time.monotonic(), 0.01))

        slots = self._slots()
        with ThreadPoolExecutor(len(slots), thread_name_prefix="restore") as workers:
            tasks = [workers.submit(one, slot) for slot in slots]
        # all have ended, so that nothing comes to life behind a failure
        for task in tasks:
            restored = task.result()
            self._restored[restored.container] = restored
        self._require_store().require_shared()
        return sum(len(restored.pids) for restored in self._restored.values())

    def verify(self) -> None:
        """All containers are here as ``restore`` leaves them, or ``Aborted``."""
        self._require_store()
        for slot in self._slots():
            self._restored[slot.container] = self._host.restores.verify(slot)

    def take_route(self) -> None:
        link = self._link()
        for ip in self._ips:
            self._host.routes.local(ip, link.host_interface, link.pod_mac)
        if self._connections:
            self._connections.renew()
            self._connections.adopt(self._outgoing)

    def open_door(self) -> None:
        self._opened = self._open_network().open_door()

    def resume(self) -> int:
        """All tasks run; Unix time in ns right before the first did."""
        if len(self._restored) < len(self._slots()):
            self._find_restored()
        return self._host.restores.resume(self._restored.values())

    def held(self) -> tuple[Packet, ...]:
        """What the closed door here has kept out."""
        if not self._armed_ns:
            return ()
        armed = Moment(self._armed_ns, self._armed_ns)
        return self._open_network().held(
            syn_since_ns=self._armed_ns, since=armed, until=self._opened
        )

    def inject(self, packets: Iterable[Packet]) -> None:
        in_order = sorted(packets, key=lambda packet: packet.at_ns)
        self._open_network().inject(in_order, self._ips)

    # ends

    def disarm(self) -> None:
        network, self._network = self._network, None
        if network:
            network.close()
        connections, self._connections = self._connections, None
        if connections:
            connections.close()

    def kill(self) -> None:
        """Of a copy that runs and cannot go on."""
        for slot in self._slots():
            self._host.restores.abort(slot)

    def refuse(self) -> None:
        """The gate says no, the copy is killed. The expectation stays, aborted: whoever starts
        this pod now must not start it empty."""
        self.disarm()
        for slot in self._slots():
            self._host.restores.abort(slot)
        self._restored.clear()

    def forget(self, *, runs: bool, lost: bool = False) -> None:
        """Removes expectation and store; of a copy that does not run, its volumes too, and the pod
        never starts here. ``lost``: it did run, and takes no more pages; the pod starts anew."""
        store = self._store
        if store and runs and not lost and not store.drained(_DRAIN_TIMEOUT_S):
            message = "pages are still on their way into the process"
            raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=2.0)
        if self._successor:
            self._host.hooks.unexpect(self._successor, ran=runs)
        if store:
            store.destroy()
        self._store = None
        if not runs:
            self._host.volumes.remove(self._places)

    def holds_copy(self) -> bool:
        """Whether any restored task exists, also one that an earlier process had made."""
        return bool(self._restored) or any(self._host.restores.find(s) for s in self._slots())

    def _waits(self, slot: Slot) -> bool:
        try:
            self._host.restores.wait_waiting(slot, 0.0)
        except Retryable:
            return False
        return True

    def _find_restored(self) -> None:
        """After a restart of the agent."""
        for slot in self._slots():
            found = self._host.restores.find(slot)
            if found is None:
                raise Unsafe(Reason.RESTORE_FAILED, f"the copy of {slot.container} is gone")
            self._restored[slot.container] = found

    def _slots(self) -> tuple[Slot, ...]:
        return tuple(self._store.slots().values()) if self._store else ()

    def _open_network(self) -> PodNetwork:
        if self._network is None:
            link = self._link()
            self._network = self._host.networks.open(
                link.netns, link.interface, link.host_interface, link.pod_mac, link.host_mac
            )
        return self._network

    def _link(self) -> SuccessorNetwork:
        link = self._host.hooks.network(self._successor)
        if link is None:
            raise Retryable(Reason.WRONG_STEP, "the successor has no network yet")
        return link

    def _require_store(self) -> TargetStore:
        if self._store is None:
            raise Aborted(
                Reason.AGENT_RESTARTED,
                "the store of this migration is gone: this node was restarted meanwhile",
            )
        return self._store
