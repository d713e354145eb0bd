"""What is written into pods: the pin, the gate, a bare pod's successor."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from godwit_operator.manifest import bare_manifest, gated, pin_and_release, release_unchanged
from godwit_operator.targets import required_terms

GATE = {"name": "godwit.io/handover"}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def pod(affinity: Any = None, gates: Any = None) -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [], "nodeName": "n1", "schedulingGates": gates or [GATE]}
    if affinity is not None:
        spec["affinity"] = affinity
    metadata = {
        "name": "p",
        "namespace": "n",
        "uid": "u",
        "resourceVersion": "7",
        "creationTimestamp": "t",
        "managedFields": [],
        "labels": {"a": "b", "godwit.io/migration": "m"},
        "annotations": {"c": "d", "godwit.io/migration": "m"},
    }
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Running"}}


def required(terms: list[Any]) -> dict[str, Any]:
    return {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": terms}}}


requirement = st.fixed_dictionaries({"key": st.just("k"), "operator": st.just("Exists")})
term = st.fixed_dictionaries({}, optional={"matchExpressions": st.lists(requirement, max_size=2)})


@given(st.lists(term, min_size=1, max_size=3))
def test_a_pin_only_adds_to_terms(terms: list[Any]) -> None:
    patch = pin_and_release(pod(required(terms)), "n2")
    new = required_terms(patch["spec"]["affinity"])
    assert len(new) == len(terms)
    for before, after in zip(terms, new, strict=True):
        assert after.get("matchExpressions") == before.get("matchExpressions")
        if before.get("matchExpressions"):
            assert after["matchFields"][-1]["values"] == ["n2"]
        else:
            assert after == before  # an empty term matches nothing and must stay so


def test_a_pin_keeps_the_rest() -> None:
    other = {"podAntiAffinity": {"x": 1}, "nodeAffinity": {"preferred": []}}
    patch = pin_and_release(pod(other, [GATE, {"name": "mine"}]), "n2")
    assert patch["spec"]["affinity"]["podAntiAffinity"] == {"x": 1}
    assert patch["spec"]["affinity"]["nodeAffinity"]["preferred"] == []
    assert patch["spec"]["schedulingGates"] == [{"name": "mine"}]
    assert patch["metadata"]["resourceVersion"] == "7"


def test_a_bystander_loses_only_our_marks() -> None:
    patch = release_unchanged(pod())
    assert patch["spec"] == {"schedulingGates": None}
    assert patch["metadata"]["labels"] == {"godwit.io/migration": None}


def test_a_bare_pod_is_made_again_without_what_the_cluster_added() -> None:
    once = bare_manifest(pod(required([{"matchExpressions": [{"key": "k"}]}])))
    assert set(once["metadata"]) == {"name", "namespace", "labels", "annotations"}
    assert "nodeName" not in once["spec"]
    assert "status" not in once
    body = gated(once, "m2")
    assert body["spec"]["schedulingGates"] == [GATE]
    assert body["metadata"]["annotations"] == {"c": "d", "godwit.io/migration": "m2"}


def test_a_second_move_forgets_the_first_pin() -> None:
    first = pod()
    patch = pin_and_release(first, "n2")
    first["spec"]["affinity"] = patch["spec"]["affinity"]
    first["metadata"]["annotations"] |= patch["metadata"]["annotations"]
    again = bare_manifest(first)
    assert "affinity" not in again["spec"]
    assert json.loads(patch["metadata"]["annotations"]["godwit.io/original-affinity"]) is None
