"""Which node a pod may move to. Pure.

The successor passes the scheduler like any pod, only pinned. What is checked
here is what would make it wait there for ever.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from godwit_api.migration import (
    NODE_LABEL,
    NODE_READY,
    ORIGINAL_AFFINITY_ANNOTATION,
    ObstacleView,
)
from godwit_api.pods import Node, Pod, Taint, Toleration
from godwit_api.reasons import Reason
from godwit_operator.checking import obstacle
from godwit_operator.quantity import number

ARCHITECTURE_LABEL = "kubernetes.io/arch"
Object = dict[str, Any]


@dataclass(frozen=True)
class Free:
    """What a node has left by requests."""

    cpu: Decimal
    memory: Decimal


def node_obstacles(
    node: Node, pod: Pod, source: Node | None, agents: Collection[str], free: Free
) -> list[ObstacleView]:
    """Everything that keeps ``pod`` from moving to ``node``."""
    return list(_obstacles(node, pod, source, agents, free))


def _obstacles(
    node: Node, pod: Pod, source: Node | None, agents: Collection[str], free: Free
) -> Iterator[ObstacleView]:
    name = node.name
    if not node.ready:
        yield obstacle(Reason.TARGET_NOT_READY, f"Node {name} is not Ready")
    if node.metadata.labels.get(NODE_LABEL) != NODE_READY:
        yield obstacle(
            Reason.NODE_NOT_PREPARED,
            f"Node {name} has no label {NODE_LABEL}={NODE_READY}; its agent tells what is missing",
        )
    if name not in agents:
        yield obstacle(Reason.AGENT_MISSING, f"No Godwit agent is running on node {name}")
    for ip in pod.ips:
        if node.status.addresses and not node.address_for(ip):
            family = "IPv6" if ":" in ip else "IPv4"
            yield obstacle(
                Reason.NETWORK_NOT_ROUTED,
                f"Node {name} has no {family} address by which {ip} could be routed to it",
            )
    yield from _scheduling(node, pod)
    architecture = node.metadata.labels.get(ARCHITECTURE_LABEL)
    here = source.metadata.labels.get(ARCHITECTURE_LABEL) if source else architecture
    if here != architecture:
        yield obstacle(
            Reason.ARCHITECTURE_DIFFERS, f"Node {name} is {architecture}, the source is {here}"
        )
    wanted = requests(pod)
    if wanted.memory > free.memory:
        yield obstacle(
            Reason.NOT_ENOUGH_MEMORY,
            f"Node {name} has {free.memory:.0f} bytes of memory left by requests; "
            f"the pod requests {wanted.memory:.0f}",
        )
    if wanted.cpu > free.cpu:
        yield obstacle(
            Reason.TARGET_UNSCHEDULABLE,
            f"Node {name} has {free.cpu} CPUs left by requests; the pod requests {wanted.cpu}",
        )


def storage_obstacles(
    node: Node, volumes: Iterable[tuple[str, Mapping[str, Any]]]
) -> list[ObstacleView]:
    """PersistentVolumes that ``node`` cannot mount, by their required node affinity."""
    return [
        obstacle(
            Reason.TARGET_UNSCHEDULABLE,
            f"Node {node.name} does not match the node affinity of PersistentVolume {name}",
        )
        for name, required in volumes
        if not any(_term(node, term) for term in required.get("nodeSelectorTerms") or [])
    ]


def _scheduling(node: Node, pod: Pod) -> Iterator[ObstacleView]:
    name = node.name
    if node.spec.unschedulable:
        yield obstacle(Reason.TARGET_UNSCHEDULABLE, f"Node {name} is cordoned")
    for taint in node.spec.taints:
        cordon = taint.key == "node.kubernetes.io/unschedulable" and node.spec.unschedulable
        if taint.effect != "PreferNoSchedule" and not cordon and not tolerated(taint, pod):
            yield obstacle(
                Reason.TARGET_UNSCHEDULABLE,
                f"Node {name} has taint {taint.key}={taint.value}:{taint.effect}, "
                "which the pod does not tolerate",
            )
    for key, value in pod.spec.node_selector.items():
        if node.metadata.labels.get(key) != value:
            yield obstacle(
                Reason.TARGET_UNSCHEDULABLE,
                f"Node {name} does not have {key}={value} of the pod's nodeSelector",
            )
    if not fits_affinity(node, original_affinity(pod)):
        yield obstacle(
            Reason.TARGET_UNSCHEDULABLE, f"Node {name} does not match the pod's node affinity"
        )


def tolerated(taint: Taint, pod: Pod) -> bool:
    return any(_tolerates(toleration, taint) for toleration in pod.spec.tolerations)


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect and toleration.effect != taint.effect:
        return False
    if toleration.operator == "Exists":
        return toleration.key in {"", taint.key}
    return toleration.key == taint.key and toleration.value == taint.value


def original_affinity(pod: Pod) -> Object | None:
    """The pod's affinity without the pin of an earlier migration."""
    text = pod.metadata.annotations.get(ORIGINAL_AFFINITY_ANNOTATION)
    if text is None:
        return pod.spec.affinity
    found: Object | None = json.loads(text)
    return found


def fits_affinity(node: Node, affinity: Object | None) -> bool:
    """Whether ``node`` satisfies the required node affinity."""
    terms = required_terms(affinity)
    return not terms or any(_term(node, term) for term in terms)


def required_terms(affinity: Object | None) -> list[Object]:
    node_affinity = (affinity or {}).get("nodeAffinity") or {}
    required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    return list(required.get("nodeSelectorTerms") or [])


def _term(node: Node, term: Object) -> bool:
    expressions = term.get("matchExpressions") or []
    fields = term.get("matchFields") or []
    if not expressions and not fields:
        return False  # matches no node
    names = {"metadata.name": node.name}
    return all(_holds(node.metadata.labels, e) for e in expressions) and all(
        _holds(names, f) for f in fields
    )


def _holds(labels: Mapping[str, str], requirement: Object) -> bool:
    value = labels.get(requirement["key"])
    values = requirement.get("values") or []
    match requirement["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and value.isdecimal() and int(value) > int(values[0])
        case "Lt":
            return value is not None and value.isdecimal() and int(value) < int(values[0])
    return False


def requests(pod: Pod) -> Free:
    """What the pod's containers request together."""
    parts = [container.resources.requests for container in pod.spec.containers]
    return Free(
        cpu=sum((number(part.get("cpu", 0)) for part in parts), Decimal()),
        memory=sum((number(part.get("memory", 0)) for part in parts), Decimal()),
    )


def free(node: Node, pods: list[Pod]) -> Free:
    """What ``node`` has left; ``pods`` are those of the whole cluster."""
    here = [requests(p) for p in pods if p.spec.node_name == node.name and not p.finished]
    return Free(
        cpu=number(node.status.allocatable.get("cpu", 0)) - sum((p.cpu for p in here), Decimal()),
        memory=number(node.status.allocatable.get("memory", 0))
        - sum((p.memory for p in here), Decimal()),
    )


def candidates(
    nodes: list[Node], selector: Mapping[str, str] | None, source: str, room: Mapping[str, Free]
) -> list[Node]:
    """Nodes that the selector allows, the emptiest first."""
    wanted = selector if selector is not None else {NODE_LABEL: NODE_READY}
    matching = [
        node
        for node in nodes
        if node.name != source
        and all(node.metadata.labels.get(key) == value for key, value in wanted.items())
    ]
    return sorted(matching, key=lambda node: (-room[node.name].memory, node.name))
