"""Typed views of Pods and Nodes: only the fields that we read."""

# ruff: noqa: RUF012 -- msgspec copies mutable defaults

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from godwit_api.migration import MIGRATION_KEY, SCHEDULING_GATE, Metadata, View


class OwnerReference(View, frozen=True):
    """Who made an object."""

    kind: str
    name: str
    uid: str
    api_version: str = ""
    controller: bool = False


class PodMetadata(Metadata, frozen=True):
    """Metadata with owners."""

    owner_references: list[OwnerReference] = []


class Port(View, frozen=True):
    """A declared container port."""

    name: str = ""
    container_port: int = 0
    host_port: int = 0
    protocol: str = "TCP"


class Resources(View, frozen=True):
    """Requests, limits and claims, as quantities."""

    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    claims: list[Any] = []


class Hook(View, frozen=True):
    """A lifecycle hook; the value of each kind does not matter to us."""

    exec_: dict[str, Any] | None = msgspec.field(default=None, name="exec")
    http_get: dict[str, Any] | None = None
    tcp_socket: dict[str, Any] | None = None
    sleep: dict[str, Any] | None = None


class Lifecycle(View, frozen=True):
    """Hooks of a container."""

    post_start: Hook | None = None
    pre_stop: Hook | None = None


class Probe(View, frozen=True):
    """A probe; only what the kubelet runs inside the container matters to us."""

    exec_: dict[str, Any] | None = msgspec.field(default=None, name="exec")


class Profile(View, frozen=True):
    """What confines a container: the runtime's own, or one that is on the node already."""

    type: str = ""
    localhost_profile: str = ""


class SecurityContext(View, frozen=True):
    """Of a pod or a container."""

    app_armor_profile: Profile = Profile()
    seccomp_profile: Profile = Profile()


class Container(View, frozen=True):
    """One container of a pod."""

    name: str
    restart_policy: str = ""
    startup_probe: Probe | None = None
    ports: list[Port] = []
    resources: Resources = Resources()
    lifecycle: Lifecycle = Lifecycle()
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    volume_devices: list[Any] = []
    security_context: SecurityContext = SecurityContext()

    @property
    def sidecar(self) -> bool:
        """Of an init container: whether it goes on running beside the others."""
        return self.restart_policy == "Always"


class Toleration(View, frozen=True):
    """What a pod puts up with."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


class Named(View, frozen=True):
    """A reference by name."""

    name: str = ""


class PodSpec(View, frozen=True):
    """What a pod is made of."""

    node_name: str = ""
    node_selector: dict[str, str] = {}
    runtime_class_name: str | None = None
    containers: list[Container] = []
    init_containers: list[Container] = []
    ephemeral_containers: list[Any] = []
    volumes: list[dict[str, Any]] = []
    host_network: bool = False
    host_pid: bool = msgspec.field(default=False, name="hostPID")
    host_ipc: bool = msgspec.field(default=False, name="hostIPC")
    host_users: bool | None = None
    hostname: str = ""
    subdomain: str = ""
    share_process_namespace: bool | None = None
    tolerations: list[Toleration] = []
    scheduling_gates: list[Named] = []
    resource_claims: list[Any] = []
    affinity: dict[str, Any] | None = None
    security_context: SecurityContext = SecurityContext()

    @property
    def apparmor_profiles(self) -> list[str]:
        """Those that must be loaded on a node before the pod starts there."""
        return _localhost(context.app_armor_profile for context in self._contexts)

    @property
    def seccomp_profiles(self) -> list[str]:
        """Those that must be a file below the kubelet's directory ``seccomp``."""
        return _localhost(context.seccomp_profile for context in self._contexts)

    @property
    def _contexts(self) -> list[SecurityContext]:
        every = (*self.init_containers, *self.containers)
        return [self.security_context, *(one.security_context for one in every)]

    @property
    def lasting(self) -> list[Container]:
        """The containers that run as long as the pod: sidecars and the others."""
        return [*(one for one in self.init_containers if one.sidecar), *self.containers]


def _localhost(profiles: Iterable[Profile]) -> list[str]:
    return sorted({one.localhost_profile for one in profiles if one.type == "Localhost"})


class PodCondition(View, frozen=True):
    """A condition of a pod or node."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


class ContainerState(View, frozen=True):
    """Waiting, running or terminated."""

    waiting: dict[str, Any] | None = None
    running: dict[str, Any] | None = None
    terminated: dict[str, Any] | None = None


class ContainerStatus(View, frozen=True):
    """State of one container."""

    name: str
    ready: bool = False
    restart_count: int = 0
    state: ContainerState = ContainerState()


class PodIP(View, frozen=True):
    """One address of a pod, or of its node."""

    ip: str = ""


class PodStatus(View, frozen=True):
    """What the kubelet tells of a pod."""

    phase: str = ""
    pod_ips: list[PodIP] = msgspec.field(default_factory=list, name="podIPs")
    pod_ip: str = msgspec.field(default="", name="podIP")
    host_ip: str = msgspec.field(default="", name="hostIP")
    host_ips: list[PodIP] = msgspec.field(default_factory=list, name="hostIPs")
    conditions: list[PodCondition] = []
    container_statuses: list[ContainerStatus] = []
    init_container_statuses: list[ContainerStatus] = []
    reason: str = ""
    message: str = ""


class Pod(View, frozen=True):
    """A pod."""

    metadata: PodMetadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def controller(self) -> OwnerReference | None:
        return next((o for o in self.metadata.owner_references if o.controller), None)

    @property
    def terminating(self) -> bool:
        return self.metadata.deletion_timestamp is not None

    @property
    def ips(self) -> list[str]:
        """Its address, and that of the other family if it has one."""
        more = [one.ip for one in self.status.pod_ips if one.ip != self.status.pod_ip]
        return [self.status.pod_ip, *more] if self.status.pod_ip else []

    @property
    def finished(self) -> bool:
        return self.status.phase in {"Succeeded", "Failed"}

    @property
    def ready(self) -> bool:
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    @property
    def gated(self) -> bool:
        return any(gate.name == SCHEDULING_GATE for gate in self.spec.scheduling_gates)

    @property
    def migration(self) -> str | None:
        """UID of the migration that this pod is a successor of."""
        return self.metadata.annotations.get(MIGRATION_KEY)


class Taint(View, frozen=True):
    """What a node repels with."""

    key: str
    effect: str
    value: str = ""


class NodeSpec(View, frozen=True):
    """What an administrator says of a node."""

    unschedulable: bool = False
    taints: list[Taint] = []


class NodeAddress(View, frozen=True):
    """One address of a node."""

    type: str
    address: str


class NodeStatus(View, frozen=True):
    """What the kubelet tells of a node."""

    conditions: list[PodCondition] = []
    addresses: list[NodeAddress] = []
    allocatable: dict[str, Any] = {}


class Node(View, frozen=True):
    """A node."""

    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def ready(self) -> bool:
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    @property
    def address(self) -> str:
        """The address that other nodes reach this one by."""
        return next((a.address for a in self.status.addresses if a.type == "InternalIP"), "")

    def address_for(self, ip: str) -> str:
        """The address by which ``ip`` can be routed to this node: one of the same family."""
        own = (a.address for a in self.status.addresses if a.type == "InternalIP")
        return next((address for address in own if (":" in address) == (":" in ip)), "")
