"""A node whose kernel, runtime and CRIU are a list of what was done to them.

All nodes of a ``World`` write to one list, so that tests can assert the order
of effects across nodes. ``world.fail["a.dump"]`` makes that effect fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from godwit_agent.hostops.model import (
    ONLY_RESTORED,
    Container,
    ContainerFacts,
    Extent,
    Guard,
    HeldAddress,
    HostPath,
    HostRoute,
    Inspection,
    Link,
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
    Tracking,
    Volume,
)
from godwit_agent.hostops.ports import CopySink, Host, Serving
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.reasons import Reason

T = TypeVar("T")
IP = "10.244.1.7"
PAGE = bytes(range(256)) * 16


@dataclass
class World:
    """What happened, in order, and what shall fail."""

    effects: list[str] = field(default_factory=list)
    fail: dict[str, Exception | Callable[[], None]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def do(self, node: str, what: str) -> None:
        name = f"{node}.{what}"
        with self.lock:
            self.effects.append(name)
        failure = self.fail.get(name)
        if isinstance(failure, Exception):
            raise failure
        if failure:
            failure()

    def index(self, name: str) -> int:
        return self.effects.index(name)

    def since(self, name: str) -> list[str]:
        return self.effects[self.index(name) :]


def pod_state(uid: str, *, containers: tuple[str, ...] = ("app",)) -> PodState:
    return PodState(
        uid=uid,
        namespace="ns",
        name="redis-0",
        sandbox=Sandbox("sandbox-" + uid[:4], 10, HostPath("/run/netns/x"), 4711),
        containers=tuple(
            Container(
                id=f"cid-{name}",
                name=name,
                init_pid=100,
                bundle=HostPath("/b"),
                runc_root=HostPath("/r"),
                rootfs=HostPath("/b/rootfs"),
                upper_dir=None,
                cgroups={"": "/kubepods/x"},
                external_descriptors=(),
                mounts=(),
            )
            for name in containers
        ),
        link=Link("eth0", "aa:bb", "veth1", 5, "cc:dd", (f"{IP}/32",)),
    )


class FakeNode:
    """Implements every port; ``host()`` bundles them."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.pods_here: dict[str, PodState] = {}
        self.dirty = [1 << 20, 4096, 0]
        self.shared: tuple[tuple[int, int], ...] = ()  # of the source, by device and inode
        self.shared_us = 0
        self.bound = 0  # of what each round finds written, what no post-copy withholds
        self.left_out: tuple[tuple[int, int], ...] = ()
        self.vast = False  # so much memory that a freeze's look at it never comes to its end
        self.frozen_ids: set[str] = set()
        self.guard_files: dict[str, Guard] = {}
        self.ended: list[str] = []
        self.expected_pods: dict[str, str] = {}
        self.marked_pods: dict[str, str] = {}
        self.marks_age_s = 0.0
        self.waiting: set[str] = set()
        self.restored: dict[str, Restored] = {}
        self.running = False
        self.opened: tuple[Outgoing, ...] = ()
        self.adopted: list[Outgoing] = []
        self.aborted_slots: set[str] = set()
        self.got: dict[str, list[tuple[object, ...]]] = {}
        self.stores_here: dict[str, FakeStore] = {}
        self.captured: list[Packet] = []
        self.injected: list[bytes] = []
        self.unread: tuple[bytes, ...] = ()
        self.routes_here: dict[str, HostRoute] = {}
        self.without_redirects: set[str] = set()
        self.held_here: dict[str, HeldAddress] = {}
        self.obstacles: tuple[object, ...] = ()
        self.cpu: tuple[str, ...] = ("avx", "sse")
        self.drained = True
        self.killed = False
        self.directories: dict[HostPath, bool] = {}
        self.cpus: dict[str, float] = {}  # of containers that are slowed down
        self.withholds = 0  # pages that a freeze with an allowance does not send
        self.wanted: list[Piece] = []  # what processes wait for
        self.serving = Serving.RUNNING

    def do(self, what: str) -> None:
        self.world.do(self.name, what)

    def reboot(self) -> None:
        """What its memory held is gone: processes, and all below ``/run``."""
        self.frozen_ids.clear()
        self.guard_files.clear()
        self.waiting.clear()
        self.restored.clear()
        self.stores_here.clear()
        self.running = False

    def host(self) -> Host:
        return Host(
            pods=_Pods(self),
            inspector=_Inspector(self),
            probe=_Probe(self),
            cgroups=_Cgroups(self),
            throttles=_Throttles(self),
            copies=_Copies(self),
            dumps=_Dumps(self),
            stores=_Stores(self),
            volumes=_Volumes(self),
            restores=_Restores(self),
            hooks=_Hooks(self),
            networks=_Networks(self),
            datagrams=_Datagrams(self),
            routes=_Routes(self),
            addresses=_Addresses(self),
            connections=_Connections(self),
        )

    def successor_arrives(self, uid: str) -> None:
        """The kubelet has come as far as the gate."""
        self.pods_here[uid] = pod_state(uid)
        self.waiting |= {"app"}


class _Part:
    def __init__(self, node: FakeNode) -> None:
        self.node = node


class _Pods(_Part):
    def find(self, pod_uid: str) -> PodState:
        if pod_uid not in self.node.pods_here:
            raise Rejected(Reason.POD_NOT_FOUND, f"pod {pod_uid} is not here")
        return self.node.pods_here[pod_uid]

    def list(self) -> tuple[str, ...]:
        return tuple(self.node.pods_here)

    def ended(self, pod: PodState) -> tuple[str, ...]:
        return tuple(self.node.ended)

    def wait_forgotten(self, container_ids: Iterable[str], timeout_s: float) -> bool:
        return True


class _Inspector(_Part):
    def inspect(self, pod: PodState) -> Inspection:
        facts = tuple(ContainerFacts(c.name, c.id, 1 << 20, 1024, 1) for c in pod.containers)
        return Inspection((), facts)


class _Probe(_Part):
    def facts(self) -> NodeFacts:
        return NodeFacts(
            kernel="6.18",
            architecture="x86_64",
            versions={"criu": "4.2", "agent": "1", "hook": "1"},
            cpu_features=self.node.cpu,
            tracking=Tracking.USERFAULTFD,
            problems=(),
            ip_pools=("10.244.1.0/24",) if self.node.name == "a" else ("10.244.2.0/24",),
        )

    def missing(self, profiles: Profiles) -> tuple[str, ...]:
        return tuple(n for n in (*profiles.apparmor, *profiles.seccomp) if n != "everywhere")


class _Cgroups(_Part):
    def guard(self, container: Container | Sandbox) -> None:
        self.node.do("cgroup_guard")

    def unguard(self, container: Container | Sandbox) -> None:
        self.node.do("cgroup_unguard")

    def freeze(self, container_ids: Iterable[str], timeout_s: float) -> int:
        self.node.do("freeze")
        self.node.frozen_ids |= set(container_ids)
        return time.time_ns()

    def thaw(self, container_ids: Iterable[str]) -> int:
        self.node.do("thaw")
        self.node.frozen_ids -= set(container_ids)
        return time.time_ns()

    def frozen(self, container_id: str) -> bool:
        return container_id in self.node.frozen_ids

    def pids(self, container_id: str) -> tuple[int, ...]:
        return (100,)

    def kill(self, container_ids: Iterable[str], timeout_s: float = 10.0) -> None:
        self.node.do("kill")
        self.node.killed = True

    def list(self) -> tuple[str, ...]:
        return ()


class _Throttles(_Part):
    """Every container would use one CPU, and writes in proportion to what it gets."""

    def used_seconds(self, container: Container) -> float:
        return time.monotonic()

    def limit(self, container: Container, cpus: float) -> None:
        self.node.do("throttle")
        self.node.cpus[container.id] = cpus

    def lift(self, container: Container) -> None:
        self.node.do("lift_throttle")
        self.node.cpus.pop(container.id, None)

    def lift_all(self) -> None:
        self.node.cpus.clear()


class _Memory(_Part):
    rounds = 0
    began = 0.0

    def bootstrap(self) -> Iterable[tuple[str, str, bytes]]:
        return [("app", "pstree.img", b"tree"), ("app", "inventory.img", b"inv")]

    def announce(self, sink: CopySink) -> bool:
        self.node.do("announce")
        return self.rounds == 0

    def shared(self, container: str) -> tuple[tuple[int, int], ...]:
        return self.node.shared

    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        self.node.do("round")
        now = time.monotonic()
        since_us, self.began = round((now - self.began) * 1e6) if self.began else 0, now
        dirty = self.node.dirty[min(self.rounds, len(self.node.dirty) - 1)]
        self.rounds += 1
        dirty = int(dirty * min(self.node.cpus.values(), default=1.0)) // len(PAGE) * len(PAGE)
        for start in range(0, dirty, len(PAGE)):
            sink.pages("app", 1, 0x10000 + start, memoryview(PAGE))
        bound = min(self.node.bound, dirty)
        return RoundStats(
            dirty, dirty, 10, since_us, freeze_us=self.node.shared_us, bound_bytes=bound
        )

    def final(
        self,
        sink: CopySink,
        allowance: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundStats:
        self.node.do("final_memory")
        while self.node.vast:
            if cancelled():
                raise Aborted(Reason.CANCELLED, "cancelled while memory was copied")
            time.sleep(0.005)
        sink.pages("app", 1, 0x10000, memoryview(PAGE))
        withheld = self.node.withholds if allowance is not None else 0
        if withheld:
            sink.file("app", b"withheld", memoryview(str(withheld).encode()))
        return RoundStats(4096, 4096, 10, 10, {"scan": 3}, withheld_bytes=withheld * len(PAGE))

    def close(self) -> None:
        self.node.do("close_memory")


class _Files(_Part):
    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        sink.file("app", b"data.txt", memoryview(b"hello"))
        return RoundStats(0, 5, 10, 10)

    def final(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        self.node.do("final_files")
        return RoundStats(0, 0, 10, 10)

    def close(self) -> None:
        self.node.do("close_files")


class _Copies(_Part):
    def memory(self, pod: PodState) -> _Memory:
        return _Memory(self.node)

    def files(self, pod: PodState) -> _Files:
        for volume in pod.volumes:
            self.node.do(f"read {volume.path}")
        return _Files(self.node)

    def frozen(self, pod: PodState) -> _Frozen:
        return _Frozen(self.node)


class _Frozen(_Part):
    def read(self, piece: Piece) -> list[Extent]:
        self.node.do("read_pages")
        if self.node.killed or not self.node.frozen_ids:
            raise Rejected(Reason.SOURCE_EXITED, "no such process stands here")
        return [
            Extent(start, end - start, PAGE * ((end - start) // len(PAGE)))
            for start, end in piece.ranges
        ]

    def close(self) -> None:
        pass


class _Dump(_Part):
    def wait_waiting(self, timeout_s: float) -> None:
        self.node.do("dump_gated")

    def leave_out(self, shared: Iterable[tuple[int, int]]) -> None:
        self.node.left_out = tuple(shared)

    def open_gate(self) -> None:
        self.node.do("dump")

    def wait_dumped(self, timeout_s: float) -> None:
        self.node.do("dumped")

    def images(self, *, moving: bool) -> Iterator[tuple[str, bytes]]:
        self.node.do("images")
        yield "core-1.img", b"core"

    def reject(self, timeout_s: float = 5.0) -> None:
        self.node.do("reject")

    def finish(self, timeout_s: float = 30.0) -> None:
        self.node.do("finish_dump")

    def kill(self) -> None:
        self.node.do("kill_dump")


class _Dumps(_Part):
    def prepare(
        self, container: Container, migration_uid: str, *, post_copy: bool = False
    ) -> _Dump:
        self.node.do("prepare_dump")
        return _Dump(self.node)

    def recover(self, container: Container, migration_uid: str) -> None:
        self.node.do("recover_dump")

    def reap(self, container: Container, migration_uid: str) -> None:
        self.node.do("reap_dump")


AWAY = 0x40000000
"""Where the pages are that the fake source withholds."""


class FakeMissing(_Part):
    """A set of addresses; each store has one, which outlives the agent's process."""

    def __init__(self, node: FakeNode) -> None:
        super().__init__(node)
        self.pages: set[int] = set()
        self.lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return len(self.pages) * len(PAGE)

    def pieces(self, most: int) -> Iterator[Piece]:
        for address in sorted(self.pages):
            yield Piece("app", 1, ((address, address + len(PAGE)),))

    def wanted(self, timeout_s: float) -> list[Piece]:
        end = time.monotonic() + min(timeout_s, 0.05)
        while not self.node.wanted and time.monotonic() < end:
            time.sleep(0.002)
        found, self.node.wanted = self.node.wanted, []
        return found

    def arrived(self, piece: Piece, extents: Iterable[Extent]) -> None:
        self.node.do("arrived")
        for (start, end), extent in zip(piece.ranges, extents, strict=True):
            assert (extent.vaddr, extent.length) == (start, end - start)
            assert extent.data == PAGE * (extent.length // len(PAGE))
            with self.lock:
                self.pages -= set(range(start, end, len(PAGE)))

    def serving(self) -> Serving:
        return self.node.serving

    def hold(self) -> None:
        pass

    def let_go(self) -> None:
        self.node.do("let_go")


class FakeStore(_Part):
    """Remembers what came."""

    def __init__(self, node: FakeNode, uid: str, containers: tuple[str, ...]) -> None:
        super().__init__(node)
        self.uid = uid
        self.away = FakeMissing(node)
        self.ever_missing = False
        self.got: list[tuple[object, ...]] = []
        self._slots = {
            name: Slot(name, HostPath(f"/s/{name}"), HostPath("/s/i"), HostPath("/s/w"))
            for name in containers
        }

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        self.got.append(("pages", container, vpid, vaddr, len(data)))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self.got.append(("zero", container, vpid, vaddr, length))

    def image(self, container: str, name: str, offset: int, total: int, data: memoryview) -> None:
        self.got.append(("image", container, name, bytes(data)))

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self.got.append(("file", container, header, bytes(body)))

    def slots(self) -> Mapping[str, Slot]:
        return self._slots

    def bind(self, successor: PodState) -> None:
        self.node.do("bind")

    def charge(self, successor: PodState) -> None:
        self.node.do("charge")

    def start_daemons(self) -> None:
        self.node.do("start_daemons")

    def complete(self, *, may_miss: bool = False) -> StoreTotals:
        self.node.do("complete")
        assert ("image", "app", "core-1.img", b"core") in self.got, "acknowledged too early"
        for entry in self.got:
            if entry[0] == "file" and entry[2] == b"withheld":
                if not may_miss:
                    raise Aborted(Reason.VERIFY_FAILED, "pages have stayed on the source")
                count = int(str(entry[3], "ascii"))  # type: ignore[call-overload]
                self.away.pages = {AWAY + at * len(PAGE) for at in range(count)}
                self.ever_missing = True
        return StoreTotals(4096, 4, 1, missing_bytes=self.away.bytes)

    def missing(self) -> FakeMissing | None:
        return self.away if self.ever_missing else None

    def require_shared(self) -> None:
        self.node.do("require_shared")

    def destroy(self) -> None:
        self.node.do("destroy_store")
        self.node.stores_here.pop(self.uid, None)

    def drained(self, timeout_s: float) -> bool:
        return self.node.drained


class _Stores(_Part):
    def create_source(self, migration_uid: str) -> None:
        self.node.do("create_source")

    def destroy_source(self, migration_uid: str) -> None:
        self.node.do("destroy_source")

    def create_target(
        self,
        migration_uid: str,
        containers: tuple[str, ...],
        memory_bytes: int,
        places: tuple[Place, ...] = (),
    ) -> FakeStore:
        self.node.do("create_target")
        store = FakeStore(self.node, migration_uid, containers)
        self.node.stores_here[migration_uid] = store
        return store

    def open_target(self, migration_uid: str) -> FakeStore | None:
        return self.node.stores_here.get(migration_uid)

    def destroy(self, migration_uid: str) -> None:
        self.node.do("sweep_store")
        self.node.stores_here.pop(migration_uid, None)

    def list(self) -> tuple[str, ...]:
        return tuple(self.node.stores_here)


class _Volumes(_Part):
    """``directories`` of the node: path to whether something is in it."""

    def leaving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        here = self.node.directories
        return tuple(
            Obstacle(Reason.VOLUME_CANNOT_FOLLOW, f"volume {one.name} is not there")
            for one in volumes
            if one.path not in here
        )

    def arriving(self, volumes: Iterable[Volume]) -> tuple[Obstacle, ...]:
        here = self.node.directories
        return tuple(
            Obstacle(Reason.VOLUME_CANNOT_FOLLOW, f"volume {one.name}: {one.path} is not empty")
            for one in volumes
            if here.get(one.path)
        )

    def survey(self, volumes: Iterable[Volume]) -> tuple[Place, ...]:
        wanted = tuple(volumes)
        for fault in self.arriving(wanted):
            raise Rejected(fault.reason, fault.message)
        return tuple(
            Place(v.name, v.path, None if v.path in self.node.directories else v.path)
            for v in wanted
        )

    def make(self, places: Iterable[Place]) -> None:
        for place in places:
            self.node.do("make_volume")
            self.node.directories.setdefault(place.path, False)

    def remove(self, places: Iterable[Place]) -> None:
        for place in places:
            self.node.do("remove_volume")
            if place.made:
                self.node.directories.pop(place.path, None)
            else:
                self.node.directories[place.path] = False


class _Restores(_Part):
    def wait_waiting(self, slot: Slot, timeout_s: float) -> str:
        if slot.container not in self.node.waiting:
            raise Retryable(Reason.TIMED_OUT, "not yet")
        return "new-cid"

    def restore(self, slot: Slot, timeout_s: float) -> Restored:
        self.node.do("restore")
        restored = Restored(slot.container, "new-cid", 200, (200, 201))
        self.node.restored[slot.container] = restored
        return restored

    def resume(self, restored: Iterable[Restored]) -> int:
        self.node.do("resume")
        assert list(restored)
        self.node.running = True
        return time.time_ns()

    def find(self, slot: Slot) -> Restored | None:
        return self.node.restored.get(slot.container)

    def verify(self, slot: Slot) -> Restored:
        found = self.find(slot)
        if found is None:
            raise Aborted(Reason.RESTORE_FAILED, "nothing here")
        return found

    def abort(self, slot: Slot) -> None:
        self.node.do("abort_restore")
        self.node.aborted_slots.add(slot.container)
        self.node.restored.pop(slot.container, None)


class _Hooks(_Part):
    def wait(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        end = time.monotonic() + timeout_s
        while (found := look()) is None and time.monotonic() < end:
            time.sleep(0.005)
        return found

    def guard(
        self, container_ids: Iterable[str], migration: str, epoch: int, deadline: int
    ) -> None:
        self.node.do("guard_files")
        for cid in container_ids:
            self.node.guard_files[cid] = Guard(cid, migration, epoch, deadline)

    def unguard(self, container_ids: Iterable[str]) -> None:
        self.node.do("unguard_files")
        for cid in container_ids:
            self.node.guard_files.pop(cid, None)

    def guards(self) -> tuple[Guard, ...]:
        return tuple(self.node.guard_files.values())

    def expect(
        self,
        pod_uid: str,
        migration: str,
        epoch: int,
        ips: tuple[str, ...],
        slots: Mapping[str, Slot],
        plan: Plan = ONLY_RESTORED,
    ) -> None:
        self.node.do("expect")
        self.node.expected_pods[pod_uid] = self.node.marked_pods[pod_uid] = migration

    def unexpect(self, pod_uid: str, *, ran: bool) -> None:
        self.node.do("unexpect")
        self.node.expected_pods.pop(pod_uid, None)
        if ran:
            self.unmark(pod_uid)

    def expected(self) -> Mapping[str, str]:
        return dict(self.node.expected_pods)

    def marks(self) -> tuple[Mark, ...]:
        marked = self.node.marked_pods.items()
        return tuple(Mark(uid, migration, self.node.marks_age_s) for uid, migration in marked)

    def unmark(self, pod_uid: str) -> None:
        self.node.marked_pods.pop(pod_uid, None)

    def network(self, pod_uid: str) -> SuccessorNetwork | None:
        if pod_uid not in self.node.pods_here:
            return None
        netns = HostPath("/run/netns/y")
        return SuccessorNetwork(
            IP, "10.244.2.9", "10.244.2.1", netns, "eth0", "veth9", "sb", "aa", "bb"
        )


class _Network(_Part):
    def hold_syns(self) -> int:
        self.node.do("hold_syns")
        return time.time_ns()

    def drop(self) -> Moment:
        return self._change("drop")

    def lift(self) -> Moment:
        return self._change("lift")

    def open_door(self) -> Moment:
        return self._change("open_door")

    def _change(self, what: str) -> Moment:
        before_ns = time.time_ns()
        self.node.do(what)
        return Moment(before_ns, time.time_ns())

    def close_door(self) -> None:
        self.node.do("close_door")

    def fall_silent(self) -> None:
        self.node.do("fall_silent")

    def held(
        self, *, syn_since_ns: int, since: Moment, until: Moment | None = None
    ) -> tuple[Packet, ...]:
        return tuple(p for p in self.node.captured if p.at_ns >= since.after_ns)

    def inject(self, packets: Iterable[Packet], own: Iterable[str] = ()) -> int:
        found = [packet.data for packet in packets]
        self.node.injected += found
        if found:
            self.node.do("inject")
        return len(found)

    def close(self) -> None:
        self.node.do("close_network")


class _Networks(_Part):
    def open(
        self, netns: str, interface: str, host_interface: str, pod_mac: str, host_mac: str
    ) -> _Network:
        self.node.do("capture")
        return _Network(self.node)

    def reset(self, netns: str) -> None:
        self.node.do("reset_network")


class _Datagrams(_Part):
    def find(self, pod: PodState) -> _Unread:
        self.node.do("find_unread")
        return _Unread(self.node)


class _Unread(_Part):
    def before(self, held: tuple[Packet, ...], until_ns: int) -> tuple[Packet, ...]:
        self.node.do("take_unread")
        unread, self.node.unread = self.node.unread, ()
        return (*(Packet(until_ns - 1, data) for data in unread), *held)

    def close(self) -> None:
        self.node.do("close_unread")


class _Routes(_Part):
    def prepare(self, ips: Iterable[str]) -> None:
        self.node.do("prepare_routes")
        self.node.without_redirects |= set(ips)

    def settle(self, moving: Iterable[str]) -> None:
        self.node.do("settle_routes")
        self.node.without_redirects &= {*moving, *self.node.routes_here}

    def local(self, ip: str, host_interface: str, pod_mac: str) -> None:
        self.node.do("route_local")
        self.node.without_redirects.add(ip)
        self.node.routes_here[ip] = HostRoute(ip, host_interface, None)

    def via(self, ip: str, node_address: str) -> None:
        self.node.do("route_via")
        self.node.without_redirects.add(ip)
        self.node.routes_here[ip] = HostRoute(ip, None, node_address)

    def remove(self, ip: str) -> None:
        self.node.do("route_remove")
        del self.node.routes_here[ip]

    def list(self) -> tuple[HostRoute, ...]:
        return tuple(self.node.routes_here.values())


class _Connections(_Part):
    def watch(self, ips: tuple[str, ...]) -> _HeldConnections:
        self.node.do("watch_connections")
        return _HeldConnections(self.node)


class _HeldConnections(_Part):
    def renew(self) -> tuple[int, int]:
        self.node.do("renew_connections")
        return 0, 0

    def outgoing(self) -> tuple[Outgoing, ...]:
        return self.node.opened

    def let_go(self) -> None:
        self.node.do("let_go")

    def adopt(self, connections: Iterable[Outgoing]) -> tuple[int, int]:
        self.node.do("adopt")
        self.node.adopted += connections
        return len(self.node.adopted), 0

    def close(self) -> None:
        pass


class _Addresses(_Part):
    def hold(self, ip: str, pod_uid: str) -> None:
        self.node.do("hold_address")
        self.node.held_here[ip] = HeldAddress(ip, pod_uid, ())

    def release(self, ip: str) -> None:
        self.node.do("release_address")
        self.node.held_here.pop(ip, None)

    def list(self) -> tuple[HeldAddress, ...]:
        return tuple(self.node.held_here.values())
