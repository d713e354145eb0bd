"""What the rest of the agent may ask of the host.

Everything blocks, nothing forks, every object may be used from any thread (one
call at a time per object unless said otherwise). Errors are those of
``godwit_api.errors``; the reasons a call raises are named at the call. Times
called ``*_ns`` are CLOCK_REALTIME, comparable with the kernel's packet stamps
of the same node only. All calls that change something may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeVar

from godwit_agent.hostops.model import (
    Container,
    Extent,
    Guard,
    HeldAddress,
    HostRoute,
    Inspection,
    Mark,
    Moment,
    NodeFacts,
    Obstacle,
    Outgoing,
    Packet,
    Piece,
    Place,
    Plan,
    PodState,
    Profiles,
    Restored,
    RoundStats,
    Sandbox,
    Slot,
    StoreTotals,
    SuccessorNetwork,
    Volume,
)

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview


class CopySink(Protocol):
    """Where a source's bytes go; must not keep ``data`` after it returns.

    Calls for pages may come from another thread than calls for files.
    """

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None: ...
    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None: ...
    def file(self, container: str, header: bytes, body: memoryview) -> None: ...


class Pods(Protocol):
    """The runtime's state on this node."""

    def find(self, pod_uid: str) -> PodState:
        """``Rejected``: PodNotFound, PodNotRunning, WrongRuntimeClass."""

    def list(self) -> tuple[str, ...]:
        """UIDs of all pods with a sandbox here."""

    def ended(self, pod: PodState) -> tuple[str, ...]:
        """Names of the containers whose first process has ended, or has been killed and is only
        held up by its freeze."""

    def wait_forgotten(self, container_ids: Iterable[str], timeout_s: float) -> bool:
        """Whether the runtime has done with containers whose processes have ended."""


class Inspector(Protocol):
    """What CRIU cannot dump, or what cannot follow; never raises for a process that has gone."""

    def inspect(self, pod: PodState) -> Inspection: ...


class NodeProbe(Protocol):
    def facts(self) -> NodeFacts:
        """Probed once per agent life where it is dear, always where it can change."""

    def missing(self, profiles: Profiles) -> tuple[str, ...]:
        """Those that are not on this node, each as a person calls it."""


class Cgroups(Protocol):
    """Guard cgroups ``/godwit/<container id>``; limits of the container go along."""

    def guard(self, container: Container | Sandbox) -> None:
        """Moves all processes out of the kubelet's tree. ``Retryable(Internal)``."""

    def unguard(self, container: Container | Sandbox) -> None:
        """Moves them back where the runtime had put them, thawed, and removes the guard."""

    def freeze(self, container_ids: Iterable[str], timeout_s: float) -> int:
        """Returns when nothing runs any more, with the time in ns. ``Aborted(FreezeTimeout)``."""

    def thaw(self, container_ids: Iterable[str]) -> int:
        """Time in ns right after. A missing cgroup counts as thawed."""

    def frozen(self, container_id: str) -> bool: ...

    def pids(self, container_id: str) -> tuple[int, ...]:
        """Of the guard cgroup; empty when there is none."""

    def kill(self, container_ids: Iterable[str], timeout_s: float = 10.0) -> None:
        """SIGKILL, thaw, wait until all are gone, remove the cgroup. ``Retryable(TimedOut)``."""

    def list(self) -> tuple[str, ...]:
        """Container ids that have a guard cgroup."""


class Throttles(Protocol):
    """CPU time of a container in its own cgroup. The guard's, made later, has the same limit."""

    def used_seconds(self, container: Container) -> float:
        """CPU seconds so far."""

    def limit(self, container: Container, cpus: float) -> None:
        """At most ``cpus`` CPUs, and no more than before. ``Retryable(CopyFailed)``."""

    def lift(self, container: Container) -> None:
        """As it was before the first ``limit``, guarded or not."""

    def lift_all(self) -> None:
        """After a restart: whatever an earlier process has limited."""


class SourceMemory(Protocol):
    """Memory of all processes of a pod, read from outside while it runs."""

    def bootstrap(self) -> Iterable[tuple[str, str, bytes]]:
        """(container, name, content) of small images by which the target starts its page
        daemon before the freeze. Send again whenever they differ from what was sent."""

    def announce(self, sink: CopySink) -> bool:
        """Shared memory that the rounds and ``final`` take along from now on; whether there is
        more than before. Then the target must have it all (``sync``) before the next round.
        Never called: none is taken along, and CRIU dumps it."""

    def shared(self, container: str) -> tuple[tuple[int, int], ...]:
        """(device, inode) of what ``final`` sends, so that the dump can leave it out."""

    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        """What was written since the last round (everything in the first).
        ``Retryable(CopyFailed)``; ``Aborted(Cancelled)``."""

    def final(
        self,
        sink: CopySink,
        allowance: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundStats:
        """The rest; the pod must be frozen. At most ``allowance`` bytes of it are sent, what else
        there is is withheld, and the sink is told. ``Aborted``: CopyFailed, Cancelled."""

    def close(self) -> None:
        """Leaves nothing in the processes."""


class FrozenMemory(Protocol):
    """Memory of a pod that has been dumped and stands frozen. Several calls at a time."""

    def read(self, piece: Piece) -> Sequence[Extent]:
        """All of it. ``Rejected(SourceExited)``: the process does not stand there any more;
        ``Retryable(CopyFailed)``."""

    def close(self) -> None: ...


class SourceFiles(Protocol):
    """Overlay upper directory, emptyDir, /dev/shm and ``PodState.volumes`` of a pod."""

    def round(
        self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False
    ) -> RoundStats: ...
    def final(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        """The rest; the pod must be frozen."""

    def close(self) -> None: ...


class Copies(Protocol):
    """``tracking`` of ``NodeFacts`` says which way memory is tracked."""

    def memory(self, pod: PodState) -> SourceMemory: ...
    def frozen(self, pod: PodState) -> FrozenMemory: ...
    def files(self, pod: PodState) -> SourceFiles: ...


class GatedDump(Protocol):
    """One container's ``runc checkpoint``, started long before it is needed.

    ``wait_waiting`` → ``open_gate`` → ``wait_dumped`` → ``images``, then either
    ``reject`` (rollback) or, after the commit, ``finish``. ``kill`` at any time
    before ``open_gate``.
    """

    def wait_waiting(self, timeout_s: float) -> None:
        """``Aborted(DumpFailed)``."""

    def leave_out(self, shared: Iterable[tuple[int, int]]) -> None:
        """Before ``open_gate``: shared memory, by device and inode, that others take along."""

    def open_gate(self) -> None: ...

    def wait_dumped(self, timeout_s: float) -> None:
        """All images are written, all tasks are held. ``Aborted(DumpFailed)``: CRIU's error."""

    def images(self, *, moving: bool) -> Iterator[tuple[str, bytes]]:
        """(name, content), pages of what is not lazy included. ``moving``: not for later; what
        other pods write to network volumes meanwhile does not matter to the restore."""

    def reject(self, timeout_s: float = 60.0) -> None:
        """CRIU lets go of the processes, which stay frozen; sockets leave repair mode.
        Correct in every state, also when the dump has failed by itself or never began.
        Call it before thawing. ``Unsafe`` when CRIU cannot be made to let go."""

    def finish(self, timeout_s: float = 30.0) -> None:
        """After the commit, outside the client's gap: CRIU ends and kills the tree."""

    def kill(self) -> None:
        """Ends what waits at the gate and removes its files."""


class Dumps(Protocol):
    def prepare(
        self, container: Container, migration_uid: str, *, post_copy: bool = False
    ) -> GatedDump:
        """Starts it; the container must be in its guard cgroup. Images lie in the migration's
        store, which must exist (``Stores.create_source``). Of a ``post_copy`` it does not look
        at memory that the agent tracks."""

    def recover(self, container: Container, migration_uid: str) -> None:
        """After a restart of the agent, for a migration that did not commit: whatever a former
        ``GatedDump`` left lets go of the processes; they may be thawed then. See ``reject``."""

    def reap(self, container: Container, migration_uid: str) -> None:
        """After a restart, for a migration that did commit: ends CRIU and runc of it."""


class Serving(Enum):
    """What the page daemons of a copy do."""

    RUNNING = auto()
    ENDED = auto()  # there is nothing left to serve
    BROKEN = auto()  # one has died with pages that it had not served: they read as zero


class MissingPages(Protocol):
    """Pages of a copy that are still on the source. Several calls at a time."""

    @property
    def bytes(self) -> int:
        """How much there is."""

    def pieces(self, most: int) -> Iterator[Piece]:
        """All there is, in the order in which it is best to come; at most ``most`` bytes each."""

    def wanted(self, timeout_s: float) -> Sequence[Piece]:
        """What processes wait for, with what is missing around it; none after the timeout. Told
        again as long as it has not arrived. Returns also when ``serving`` has changed."""

    def arrived(self, piece: Piece, extents: Iterable[Extent]) -> None:
        """Content of the whole piece. What has arrived before is left alone."""

    def serving(self) -> Serving: ...

    def hold(self) -> None:
        """From now on until ``let_go`` a process whose daemon dies waits for ever instead of
        reading zeros. Again for children that have come since."""

    def let_go(self) -> None: ...


class TargetStore(Protocol):
    """Everything of one migration on its target. The four sink calls are thread-safe."""

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None: ...
    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None: ...
    def image(
        self, container: str, name: str, offset: int, total: int, data: memoryview
    ) -> None: ...
    def file(self, container: str, header: bytes, body: memoryview) -> None:
        """Staged until ``bind``, applied at once after it."""

    def slots(self) -> Mapping[str, Slot]: ...

    def bind(self, successor: PodState) -> None:
        """The successor's volumes and upper directories exist: what was staged goes there.
        May be called again when another container has appeared. ``Aborted(CopyFailed)``."""

    def charge(self, successor: PodState) -> None:
        """Shared memory that has come counts as the successor's from now on. While no pages
        come; best effort."""

    def start_daemons(self) -> None:
        """Page daemons of all containers whose bootstrap images have come. Before the freeze;
        restarts those whose bootstrap has changed."""

    def complete(self, *, may_miss: bool = False) -> StoreTotals:
        """In the freeze, when all has come: page maps are written, everything CRIU expects is
        there, the daemons are ready. ``may_miss``: but for what the source has withheld; see
        ``missing``. ``Aborted(VerifyFailed)``."""

    def missing(self) -> MissingPages | None:
        """Once ``complete``, also after a restart; None: nothing was ever missing."""

    def require_shared(self) -> None:
        """After the restore: it has taken all shared memory. ``Aborted(VerifyFailed)``."""

    def destroy(self) -> None:
        """Daemons, files, mount. Not before the daemons have ended, else the process loses
        pages: see ``drained``."""

    def drained(self, timeout_s: float) -> bool:
        """Whether all pages have gone into the restored processes (daemons ended with 0)."""


class Stores(Protocol):
    """``/run/godwit/store/<migration uid>``: a tmpfs of its own."""

    def create_source(self, migration_uid: str) -> None: ...

    def create_target(
        self,
        migration_uid: str,
        containers: tuple[str, ...],
        memory_bytes: int,
        places: tuple[Place, ...] = (),
    ) -> TargetStore:
        """Fresh; what a former epoch left is removed. Files of volumes go to their ``places`` at
        once. ``Rejected(NotEnoughMemory)``."""

    def open_target(self, migration_uid: str) -> TargetStore | None:
        """After a restart of the agent: only ``slots``, ``missing``, ``drained`` and ``destroy``
        are useful."""

    def destroy_source(self, migration_uid: str) -> None:
        """Only what this node has as the source."""

    def destroy(self, migration_uid: str) -> None:
        """Everything, target's daemons included."""

    def list(self) -> tuple[str, ...]: ...


class Volumes(Protocol):
    """Directories of this node that are volumes of a pod."""

    def leaving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        """What keeps them from being copied from here."""

    def arriving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        """What keeps them from being copied to here: above all, that something is there."""

    def survey(self, volumes: Iterable[Volume]) -> tuple[Place, ...]:
        """How it is there now. ``Rejected(VolumeCannotFollow)`` as ``arriving``."""

    def make(self, places: Iterable[Place]) -> None:
        """The directories. ``Aborted(CopyFailed)``."""

    def remove(self, places: Iterable[Place]) -> None:
        """As it was before ``make``, empty. ``Retryable(CopyFailed)``."""


class Restores(Protocol):
    """The target's restores: ``runc restore`` is run by the hook, this is the other side."""

    def wait_waiting(self, slot: Slot, timeout_s: float) -> str:
        """Container id that waits at the gate, and that the runtime has started (unless it has a
        terminal, for which the runtime waits itself). ``Retryable(TimedOut)``;
        ``Aborted(SuccessorFailed)`` when the restore ended already."""

    def restore(self, slot: Slot, timeout_s: float) -> Restored:
        """Opens the gate, waits for the result, checks that the process tree is the dumped
        one and every task is stopped. ``Aborted``: RestoreFailed, VerifyFailed."""

    def resume(self, restored: Iterable[Restored]) -> int:
        """SIGCONT to all; time in ns right before the first."""

    def find(self, slot: Slot) -> Restored | None:
        """After a restart of the agent: what ``restore`` had returned, if its tasks live."""

    def verify(self, slot: Slot) -> Restored:
        """Checks as ``restore`` does what it has left. ``Aborted``: RestoreFailed, VerifyFailed."""

    def abort(self, slot: Slot) -> None:
        """Waiting: the gate says no. Restored: killed. Never raises for what is not there."""


class Hooks(Protocol):
    """The files shared with ``godwit-hook`` (docs/architecture.md)."""

    def wait(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """Calls ``look`` now and after each ring of the doorbell until it returns not None."""

    def guard(
        self, container_ids: Iterable[str], migration: str, epoch: int, deadline: int
    ) -> None:
        """Writes or renews, fsynced; ``deadline`` in seconds of CLOCK_BOOTTIME."""

    def unguard(self, container_ids: Iterable[str]) -> None: ...
    def guards(self) -> tuple[Guard, ...]: ...

    def expect(
        self,
        pod_uid: str,
        migration: str,
        epoch: int,
        ips: tuple[str, ...],
        slots: Mapping[str, Slot],
        plan: Plan = ...,
    ) -> None:
        """``ips``: the addresses it gets, one of a family; none: it keeps the native ones."""

    def unexpect(self, pod_uid: str, *, ran: bool) -> None:
        """Nothing is expected of this pod any more. ``ran``: it is one like any other from now
        on. If not, its mark stays: the kubelet may hear later that the pod was deleted, and would
        start its containers again, empty."""

    def expected(self) -> Mapping[str, str]:
        """Pod UID to migration UID."""

    def marks(self) -> tuple[Mark, ...]:
        """Of all pods that restore here or do not start."""

    def unmark(self, pod_uid: str) -> None: ...

    def network(self, pod_uid: str) -> SuccessorNetwork | None: ...


class PodNetwork(Protocol):
    """One pod's netns and the host's end of its link, opened before the freeze.

    Capture runs from the moment it is opened until ``close``.
    """

    def hold_syns(self) -> int:
        """New connections wait (their SYNs are dropped and captured); time in ns before it."""

    def drop(self) -> Moment:
        """Nothing passes from now on but CRIU's own packets (mark 0xC114). Idempotent."""

    def lift(self) -> Moment:
        """Removes ``hold_syns`` and ``drop``."""

    def open_door(self) -> Moment:
        """Removes the hook's door, and whoever asks for the pod's link address is answered."""

    def close_door(self) -> None: ...

    def fall_silent(self) -> None:
        """After ``drop``, for good: the address is another's now, and nobody is told that it is
        here. ``OSError`` or ``Retryable``."""

    def held(
        self, *, syn_since_ns: int, since: Moment, until: Moment | None = None
    ) -> tuple[Packet, ...]:
        """Frames to the pod captured in the window; SYNs already from ``syn_since_ns`` on.
        For a move: ``since`` is the time of the freeze. For a rollback: of ``drop``, as what
        came before it lies in the sockets. What came while the window's ends took effect may
        have been delivered or not: of TCP it is among them, since a segment that comes twice
        does no harm and one that is lost comes again after 200 ms; all else is not."""

    def inject(self, packets: Iterable[Packet], own: Iterable[str] = ()) -> int:
        """To the pod, with this link's MACs, in the given order; how many. What the pod, whose
        addresses are ``own``, had sent to itself goes by its loopback interface."""

    def close(self) -> None: ...


class Networks(Protocol):
    def open(
        self, netns: str, interface: str, host_interface: str, pod_mac: str, host_mac: str
    ) -> PodNetwork:
        """``interface``: the pod's end of the link. ``Retryable(Internal)``."""

    def reset(self, netns: str) -> None:
        """After a restart: removes our tables of ``hold_syns`` and ``drop`` (not the door)."""


class UnreadDatagrams(Protocol):
    def before(self, held: tuple[Packet, ...], until_ns: int) -> tuple[Packet, ...]:
        """After the commit, once: takes it out of the sockets, as packets before those ``held``.
        What was captured before ``until_ns`` may be in a socket too, and comes once only."""

    def close(self) -> None:
        """The sockets keep what they have."""


class Datagrams(Protocol):
    def find(self, pod: PodState) -> UnreadDatagrams:
        """What UDP sockets have received and nobody has read; the pod must be frozen behind its
        closed door. Never raises."""


class Routes(Protocol):
    """Host routes of moved addresses, marked as ours by the kernel's route protocol number."""

    def prepare(self, ips: Iterable[str]) -> None:
        """Before the freeze, source and target: what a change of route needs and may be slow.
        ``Retryable(Internal)``."""

    def settle(self, moving: Iterable[str]) -> None:
        """Takes back what is prepared for addresses that are not ``moving`` and have no route.
        ``Retryable(Internal)``."""

    def local(self, ip: str, host_interface: str, pod_mac: str) -> None: ...
    def via(self, ip: str, node_address: str) -> None: ...
    def remove(self, ip: str) -> None: ...
    def list(self) -> tuple[HostRoute, ...]: ...


class Addresses(Protocol):
    """Addresses that this node's IPAM must not reissue though their pod has left."""

    def hold(self, ip: str, pod_uid: str) -> None: ...
    def release(self, ip: str) -> None: ...
    def list(self) -> tuple[HeldAddress, ...]: ...


class HeldConnections(Protocol):
    """What this node translates of the addresses of one pod."""

    def renew(self) -> tuple[int, int]:
        """In the freeze, before packets flow again: connections outlive the change of route and
        the end of the pod's former interface. Once for what was there, and once after the
        change of route for what has come meanwhile. (kept, lost)."""

    def outgoing(self) -> tuple[Outgoing, ...]:
        """Source, after ``renew``: what the pod has opened to translated addresses."""

    def let_go(self) -> None:
        """Source, once the route leads away: this node translates nothing back any more."""

    def adopt(self, connections: Iterable[Outgoing]) -> tuple[int, int]:
        """Target, before the pod runs: its connections lead where they did. (kept, lost)."""

    def close(self) -> None: ...


class Connections(Protocol):
    """This node's connection table (conntrack)."""

    def watch(self, ips: tuple[str, ...]) -> HeldConnections:
        """Before the freeze. ``Retryable(Internal)``."""


@dataclass(frozen=True, slots=True)
class Host:
    """All ports of one node."""

    pods: Pods
    inspector: Inspector
    probe: NodeProbe
    cgroups: Cgroups
    throttles: Throttles
    copies: Copies
    dumps: Dumps
    stores: Stores
    volumes: Volumes
    restores: Restores
    hooks: Hooks
    networks: Networks
    datagrams: Datagrams
    routes: Routes
    addresses: Addresses
    connections: Connections
