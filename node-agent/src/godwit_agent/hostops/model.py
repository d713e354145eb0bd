"""What the ports of this package speak about: frozen values, no behaviour.

Every value converts with ``msgspec.to_builtins`` and ``msgspec.convert``, so
that it can lie in a journal. Paths are the host's: the agent itself reaches
them only through ``HostFs``. Process ids are the host's unless called ``vpid``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from godwit_api.reasons import Reason

HostPath = NewType("HostPath", str)
"""Absolute path as the host's init process sees it."""


class Tracking(StrEnum):
    """How written pages are found; the names are those of ``NodeReport.dirty_tracking``."""

    USERFAULTFD = "userfaultfd-wp"
    PAGE_HASH = "page-hash"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why something cannot move: reason for machines, message for people."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of a container's bundle; ``kind`` is its file-system type ("bind" for binds)."""

    destination: str
    source: str
    kind: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Container:
    """A container as its runtime knows it.

    ``cgroups``: controller ("memory", "name=systemd", "" for v2) to host path
    of the directory the runtime had made for it. ``external_descriptors`` is
    what CRIU needs as ``descriptors.json``. ``upper_dir`` is None when the
    root is no overlay.
    """

    id: str
    name: str
    init_pid: int
    bundle: HostPath
    runc_root: HostPath
    rootfs: HostPath
    upper_dir: HostPath | None
    cgroups: Mapping[str, str]
    external_descriptors: tuple[str, ...]
    mounts: tuple[Mount, ...]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The pod's pause container. ``netns`` can be opened while the sandbox lives.

    ``cgroups`` as in ``Container``: a kubelet that restarts would kill it too.
    """

    id: str
    pid: int
    netns: HostPath
    netns_inode: int
    cgroups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """The pod's interface and its other end on the host. MACs are 6 bytes as hex with colons."""

    interface: str
    pod_mac: str
    host_interface: str
    host_ifindex: int
    host_mac: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume that is a directory of the node, copied to the same path of the target."""

    name: str
    path: HostPath


@dataclass(frozen=True, slots=True)
class Place:
    """Where a ``Volume`` arrives, and what was there before.

    ``made``: the topmost directory that has to be made for it. None: there was an empty directory,
    whose mode and owner the others are.
    """

    name: str
    path: HostPath
    made: HostPath | None
    mode: int = 0
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod that runs here, found again at any time by its UID. ``volumes``: those of its node's
    directories that shall go along."""

    uid: str
    namespace: str
    name: str
    sandbox: Sandbox
    containers: tuple[Container, ...]
    link: Link | None
    volumes: tuple[Volume, ...] = ()


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """Sizes of one container; memory counts what has to be copied: private, and shared once."""

    name: str
    id: str
    memory_bytes: int
    files_bytes: int
    processes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """All obstacles at once, and the sizes."""

    obstacles: tuple[Obstacle, ...]
    containers: tuple[ContainerFacts, ...]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What this node is and what it lacks; no problems: it can take part."""

    kernel: str
    architecture: str
    versions: Mapping[str, str]
    cpu_features: tuple[str, ...]
    tracking: Tracking
    problems: tuple[Obstacle, ...]
    ip_pools: tuple[str, ...]
    memory_available_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Profiles:
    """What a pod's specification wants a node to have: names of AppArmor, paths of seccomp."""

    apparmor: tuple[str, ...] = ()
    seccomp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One pass over memory and files.

    ``dirty_bytes``: found changed since the last pass; ``copied_bytes``: given
    to the sink; ``duration_us``: scan and copy; ``since_us``: from the start of
    the previous pass to this one (0 for the first); ``parts_us``: named parts;
    ``processes``: that were found. What a freeze will cost however little is written:
    ``freeze_us``, and ``carried_bytes`` of shared memory that CRIU itself dumps, sends and
    restores. ``bound_bytes`` of ``dirty_bytes`` are shared memory and files, of which no post-copy
    withholds anything; ``withheld_bytes``: changed and not sent, for post-copy.
    """

    dirty_bytes: int
    copied_bytes: int
    duration_us: int
    since_us: int
    parts_us: Mapping[str, int] = field(default_factory=dict)
    processes: int = 0
    freeze_us: int = 0
    carried_bytes: int = 0
    bound_bytes: int = 0
    withheld_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Whole pages of one process from ``vaddr`` on; no ``data``: ``length`` bytes of zeros."""

    vaddr: int
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole pages of one process of a container, without their content; ranges in order."""

    container: str
    vpid: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the restore of one container happens on the target (see ``expect.json``)."""

    container: str
    directory: HostPath
    images: HostPath
    work: HostPath


@dataclass(frozen=True, slots=True)
class Plan:
    """What a successor's containers do instead of starting, beside being restored.

    ``done``: init containers, which end at once. ``post_start`` and ``startup``: commands of
    hooks and startup probes by container, answered and not run.
    """

    done: tuple[str, ...] = ()
    post_start: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    startup: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


ONLY_RESTORED = Plan()


@dataclass(frozen=True, slots=True)
class SuccessorNetwork:
    """``network.json`` of the hook: what CNI ADD gave the successor."""

    ip: str
    native_ip: str
    gateway: str
    netns: HostPath
    interface: str
    host_interface: str
    sandbox_id: str
    pod_mac: str
    host_mac: str


@dataclass(frozen=True, slots=True)
class Restored:
    """A container whose tasks are all stopped on the target, checked against the images."""

    container: str
    container_id: str
    init_pid: int
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """What the target's store holds when it is complete. ``missing_bytes`` of ``memory_bytes``
    are still on the source."""

    memory_bytes: int
    images_bytes: int
    processes: int
    parts_us: Mapping[str, int] = field(default_factory=dict)
    missing_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard file: ``deadline_boot`` in seconds of CLOCK_BOOTTIME, which nobody sets."""

    container_id: str
    migration: str
    epoch: int
    deadline_boot: int


@dataclass(frozen=True, slots=True)
class Mark:
    """On disk, of a successor: it never starts empty. ``age_s``: since it was written."""

    pod_uid: str
    migration: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A connection of the pod whose destination its node translates: (packed address, port).

    ``status`` and ``tcp``: of the connection table, see ``hostops.net.conntrack``.
    """

    protocol: int
    client: tuple[bytes, int]
    service: tuple[bytes, int]
    server: tuple[bytes, int]
    status: int
    timeout_s: int
    tcp: bytes


@dataclass(frozen=True, slots=True)
class Packet:
    """A captured frame: virtio header, Ethernet, payload; time of the kernel's CLOCK_REALTIME."""

    at_ns: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Moment:
    """A change that took effect between two times of CLOCK_REALTIME, in ns."""

    before_ns: int
    after_ns: int


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A host route of ours: to a local pod's interface or via another node; neither when that
    interface is gone."""

    ip: str
    interface: str | None
    via: str | None


@dataclass(frozen=True, slots=True)
class HeldAddress:
    """An address of a moved pod that the IPAM of these directories must not reissue."""

    ip: str
    pod_uid: str
    ipam_dirs: tuple[HostPath, ...]
