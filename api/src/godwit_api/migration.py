"""Typed view of the PodMigration custom resource (``crds/podmigrations.yaml``).

``spec`` is what a person asked for and never changes. ``status`` is all that
has been learned; ``status.handover`` is the operator's own note for going on
after a restart and no interface.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

GROUP = "godwit.io"
VERSION = "v1alpha1"
PLURAL = "podmigrations"
KIND = "PodMigration"
API_VERSION = f"{GROUP}/{VERSION}"
FINALIZER = f"{GROUP}/cleanup"

SCHEDULING_GATE = f"{GROUP}/handover"
"""Holds a successor back until the operator lets it go."""
MIGRATION_KEY = f"{GROUP}/migration"
"""Annotation and label of a successor: UID of the migration that made it."""
HOME_NODE_ANNOTATION = f"{GROUP}/home-node"
"""Node that must keep a moved pod's address reserved."""
ORIGINAL_AFFINITY_ANNOTATION = f"{GROUP}/original-affinity"
"""Affinity of a successor before it was pinned to its target, as JSON."""
ADDRESS_ANNOTATION = f"{GROUP}/address"
"""Address that moved with the pod; set once the process runs there."""
NODE_LABEL = f"{GROUP}/node"
NODE_READY = "ready"


class Phase(StrEnum):
    """Where a migration is; for people and printer columns, never an input."""

    PENDING = "Pending"
    CHECKING = "Checking"
    COPYING = "Copying"
    HANDING_OVER = "HandingOver"
    SWITCHING = "Switching"
    COMMITTED = "Committed"
    FINISHING = "Finishing"
    SUCCEEDED = "Succeeded"
    REJECTED = "Rejected"
    ABORTED = "Aborted"
    STALLED = "Stalled"

    @property
    def final(self) -> bool:
        return self in FINAL_PHASES


FINAL_PHASES = frozenset({Phase.SUCCEEDED, Phase.REJECTED, Phase.ABORTED, Phase.STALLED})


class View(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A partial, read-only view; unknown fields are ignored."""


class Metadata(View, frozen=True):
    """The object metadata that we read."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: list[str] = []


class Target(View, frozen=True):
    """Where to; at most one of the two, neither: any other prepared node."""

    node_name: str | None = None
    node_selector: dict[str, str] | None = None


class Timeouts(View, frozen=True):
    """Bounds of the phases; the CRD holds the same defaults."""

    checking_seconds: int = 30
    copy_seconds: int = 600
    handover_seconds: int = 60
    freeze_milliseconds: int = 5000


class Spec(View, frozen=True):
    """What was asked for."""

    pod_name: str
    target: Target = Target()
    timeouts: Timeouts = Timeouts()
    freeze_budget_milliseconds: int | None = None
    dry_run: bool | None = None
    bandwidth_limit: int | str | None = None  # bytes per second, or a quantity
    compression: str | None = None  # None, Zstd
    convergence: str | None = None  # Refuse, Throttle, PostCopy
    copy_volumes: list[str] = []


class Condition(View, frozen=True, omit_defaults=False):
    """``metav1.Condition``."""

    type: str
    status: str
    reason: str
    last_transition_time: str
    message: str = ""
    observed_generation: int = 0


class ObstacleView(View, frozen=True, omit_defaults=False):
    """One reason why the migration cannot be done."""

    reason: str
    message: str


class PhaseTransition(View, frozen=True, omit_defaults=False):
    """When a phase began."""

    phase: str
    timestamp: str


class Failure(View, frozen=True, omit_defaults=False):
    """Why the migration is being given up, or its first attempt was."""

    reason: str
    message: str


class CopiedVolume(View, frozen=True, omit_defaults=False):
    """A volume of the pod that is a directory of its node, and is copied.

    ``persistent_volume``: one whose node affinity names the node, and goes along; ``home``: what
    that says before (``kubernetes.io/hostname``).
    """

    name: str
    path: str
    persistent_volume: str = ""
    home: str = ""


class Handover(View, frozen=True):
    """The operator's note for itself; written before each effect."""

    owner_kind: str = ""
    owner_name: str = ""
    owner_uid: str = msgspec.field(default="", name="ownerUID")
    containers: list[str] = []
    memory_bytes: int = 0
    files_bytes: int = 0
    address_home: str = ""
    guarded: bool = False
    rule_proven: bool = False
    delete_intended: bool = False
    expected: bool = False
    released: bool = False
    committed: bool = False
    attempt_open: bool = False
    copied: bool = False
    lost: bool = False
    unready: bool = False
    returns: int = 0
    failed_targets: list[str] = []
    failure: Failure | None = None
    step_started: str = ""
    pod_was_moved: bool = False
    volumes: list[CopiedVolume] = []


class Status(View, frozen=True):
    """What has been learned."""

    observed_generation: int = msgspec.field(default=-1)
    phase: str = ""
    step: str = ""
    epoch: int = 0
    reason: str = ""
    message: str = ""
    pod_uid: str = msgspec.field(default="", name="podUID")
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[str] = msgspec.field(default_factory=list, name="podIPs")
    successor_name: str = ""
    successor_uid: str = msgspec.field(default="", name="successorUID")
    source_node: str = ""
    target_node: str = ""
    freeze: str = ""
    freeze_milliseconds: float | None = None
    predicted_freeze_milliseconds: int | None = None
    predicted_total_seconds: float | None = None
    dirty_bytes_per_second: int | None = None
    bandwidth_bytes_per_second: int | None = None
    cpu_percent: int | None = None
    copy_seconds_left: float | None = None
    transferred_bytes: int | None = None
    remaining_bytes: int | None = None
    post_copy_bytes: int | None = None
    rounds: int | None = None
    timings: dict[str, int] = {}
    obstacles: list[ObstacleView] = []
    conditions: list[Condition] = []
    phase_transition_timestamps: list[PhaseTransition] = []
    handover: Handover = Handover()


class PodMigration(View, frozen=True):
    """One request to move one pod."""

    metadata: Metadata
    spec: Spec
    status: Status = Status()

    @property
    def ips(self) -> list[str]:
        """The addresses that move, the pod's first one before that of the other family."""
        return self.status.pod_ips or ([self.status.pod_ip] if self.status.pod_ip else [])

    @property
    def key(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def phase(self) -> Phase:
        return Phase(self.status.phase) if self.status.phase else Phase.PENDING
