"""Pod bodies: a bare pod's successor, and pinning a successor to its node. Pure."""

from __future__ import annotations

import copy
import json
from typing import Any

from godwit_api.migration import (
    ADDRESS_ANNOTATION,
    GROUP,
    HOME_NODE_ANNOTATION,
    MIGRATION_KEY,
    ORIGINAL_AFFINITY_ANNOTATION,
    SCHEDULING_GATE,
)
from godwit_operator.targets import required_terms

Object = dict[str, Any]
_OWN_ANNOTATIONS = {
    MIGRATION_KEY,
    ORIGINAL_AFFINITY_ANNOTATION,
    ADDRESS_ANNOTATION,
    HOME_NODE_ANNOTATION,
}
_OWN_METADATA = ("name", "namespace", "labels", "annotations", "ownerReferences")
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def bare_manifest(pod: Object) -> Object:
    """What a bare pod can be created from again: without what a cluster adds.

    The service account volume stays: admission adds none where its path is
    mounted already. The pin of an earlier migration goes.
    """
    old = pod["metadata"]
    metadata = {key: copy.deepcopy(old[key]) for key in _OWN_METADATA if key in old}
    annotations = metadata.get("annotations", {})
    spec = copy.deepcopy(pod["spec"])
    for key in ("nodeName", "ephemeralContainers", "schedulingGates"):
        spec.pop(key, None)
    if ORIGINAL_AFFINITY_ANNOTATION in annotations:
        original = json.loads(annotations[ORIGINAL_AFFINITY_ANNOTATION])
        spec.pop("affinity", None)
        if original is not None:
            spec["affinity"] = original
    metadata["annotations"] = {k: v for k, v in annotations.items() if k not in _OWN_ANNOTATIONS}
    metadata["labels"] = {k: v for k, v in metadata.get("labels", {}).items() if k != MIGRATION_KEY}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def gated(manifest: Object, migration: str) -> Object:
    """The successor of a bare pod, marked and gated as the rule would do it."""
    body = copy.deepcopy(manifest)
    body["metadata"]["annotations"][MIGRATION_KEY] = migration
    body["metadata"]["labels"][MIGRATION_KEY] = migration
    body["spec"]["schedulingGates"] = [{"name": SCHEDULING_GATE}]
    return body


def pin_and_release(pod: Object, node: str) -> Object:
    """Merge patch: only ``node`` will do, and our gate is lifted.

    While a pod is gated its node affinity may be narrowed: requirements may be
    added to existing terms, terms may not. So the pin goes into every term.
    """
    affinity = copy.deepcopy(pod["spec"].get("affinity")) or {}
    pin = {"key": "metadata.name", "operator": "In", "values": [node]}
    terms = required_terms(affinity)
    if terms:
        for term in terms:
            if term.get("matchExpressions") or term.get("matchFields"):  # else: matches nothing
                term["matchFields"] = [*(term.get("matchFields") or []), pin]
    else:
        terms = [{"matchFields": [pin]}]
    affinity.setdefault("nodeAffinity", {})[_REQUIRED] = {"nodeSelectorTerms": terms}
    return {
        "metadata": {
            "uid": pod["metadata"]["uid"],
            "resourceVersion": pod["metadata"]["resourceVersion"],
            "annotations": {
                ORIGINAL_AFFINITY_ANNOTATION: json.dumps(pod["spec"].get("affinity")),
            },
        },
        "spec": {"affinity": affinity, "schedulingGates": _other_gates(pod)},
    }


def release_unchanged(pod: Object) -> Object:
    """Merge patch for a pod that our rule has gated but that is no successor."""
    return {
        "metadata": {
            "uid": pod["metadata"]["uid"],
            "resourceVersion": pod["metadata"]["resourceVersion"],
            "annotations": {MIGRATION_KEY: None},
            "labels": {MIGRATION_KEY: None},
        },
        "spec": {"schedulingGates": _other_gates(pod)},
    }


def _other_gates(pod: Object) -> list[Object] | None:
    gates = pod["spec"].get("schedulingGates") or []
    return [gate for gate in gates if gate["name"] != SCHEDULING_GATE] or None


def placeholder(namespace: str) -> Object:
    """A pod for the dry run when no real one is left; passes restricted namespaces."""
    container = {
        "name": "probe",
        "image": f"{GROUP}/probe",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    metadata = {"name": "probe", "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [container]},
    }
