"""The admission rule of one handover: bodies only, pure.

A MutatingAdmissionPolicy and its binding (GA in Kubernetes 1.36) run inside the
API server: no operator is needed for them, and they fail closed. They match one
namespace and either one pod name (StatefulSet, bare pod) or one owner
(ReplicaSet, whose pods get new names), and put the successor behind a
scheduling gate.

The proof is a dry-run create. The pod's own name is taken while the pod exists
(the API server answers 409 after admission), so the rule of a name also matches
one probe name, which nobody else uses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from godwit_api.migration import MIGRATION_KEY, SCHEDULING_GATE
from godwit_api.pods import Pod

Object = dict[str, Any]
MANAGED_BY = {"app.kubernetes.io/managed-by": "godwit"}


@dataclass(frozen=True)
class Rule:
    """What identifies the successor."""

    migration: str  # UID of the PodMigration
    namespace: str
    pod_name: str = ""
    owner_uid: str = ""  # set instead of pod_name for ReplicaSets

    @property
    def name(self) -> str:
        """Name of both objects; the same after every restart."""
        return f"godwit-handover-{self.migration}"

    @property
    def probe_name(self) -> str:
        return f"godwit-probe-{self.migration}"

    def condition(self) -> str:
        """CEL over the pod being created; never looks at who creates it."""
        if self.owner_uid:
            owner = _text(self.owner_uid)
            return (
                "has(object.metadata.ownerReferences) && object.metadata.ownerReferences"
                f".exists(o, o.uid == {owner} && has(o.controller) && o.controller)"
            )
        names = f"[{_text(self.pod_name)}, {_text(self.probe_name)}]"
        return f"has(object.metadata.name) && object.metadata.name in {names}"


def _text(value: str) -> str:
    return json.dumps(value)  # a JSON string is a CEL string


def policy(rule: Rule) -> Object:
    """Gate and mark the successor; refuse its creation if that is impossible."""
    mark = f"{_text(MIGRATION_KEY)}: {_text(rule.migration)}"
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": rule.name, "labels": MANAGED_BY | {MIGRATION_KEY: rule.migration}},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "IfNeeded",
            "matchConstraints": {
                "matchPolicy": "Equivalent",
                "namespaceSelector": {
                    "matchLabels": {"kubernetes.io/metadata.name": rule.namespace}
                },
                "resourceRules": [
                    {
                        "apiGroups": [""],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE"],
                        "resources": ["pods"],
                    }
                ],
            },
            "matchConditions": [{"name": "successor", "expression": rule.condition()}],
            "mutations": [
                {
                    "patchType": "ApplyConfiguration",
                    "applyConfiguration": {
                        "expression": (
                            "Object{"
                            f"metadata: Object.metadata{{annotations: {{{mark}}}, "
                            f"labels: {{{mark}}}}}, "
                            "spec: Object.spec{schedulingGates: "
                            f"[Object.spec.schedulingGates{{name: {_text(SCHEDULING_GATE)}}}]}}"
                            "}"
                        )
                    },
                }
            ],
        },
    }


def binding(rule: Rule) -> Object:
    """Puts the policy in force."""
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": rule.name, "labels": MANAGED_BY | {MIGRATION_KEY: rule.migration}},
        "spec": {"policyName": rule.name},
    }


def probe(rule: Rule, pod: Object) -> Object:
    """The successor as its owner would create it, for the dry run."""
    spec = {k: v for k, v in pod["spec"].items() if k not in {"nodeName", "schedulingGates"}}
    old = pod["metadata"]
    owners = [o | {"blockOwnerDeletion": False} for o in old.get("ownerReferences", [])]
    metadata: Object = {
        "name": rule.probe_name,
        "namespace": rule.namespace,
        "labels": {k: v for k, v in old.get("labels", {}).items() if k != MIGRATION_KEY},
        "ownerReferences": owners,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def admitted(rule: Rule, pod: Pod) -> bool:
    """Whether the rule has put its mark on ``pod``."""
    return pod.gated and pod.migration == rule.migration
