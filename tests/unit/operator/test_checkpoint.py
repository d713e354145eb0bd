"""What the operator decides about checkpoints and restores, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.reasons import Reason
from godwit_operator.checkpoint import obstacle_of
from godwit_operator.checkpoint_status import phase_of
from godwit_operator.restore import GATE, LABEL, restored_pod, worst


def _pod(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "redis-0",
            "namespace": "shop",
            "uid": "u",
            "ownerReferences": [{"kind": "StatefulSet", "name": "redis", "uid": "o"}],
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "redis"}], **spec},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }


def _required(body: dict[str, Any]) -> Any:
    affinity = body["spec"]["affinity"]["nodeAffinity"]
    return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


def test_the_restored_pod_waits_for_its_node_and_belongs_to_nobody() -> None:
    body = restored_pod(_pod(), "other", "n2", "uid-1")
    assert body["metadata"]["name"] == "other"
    assert "ownerReferences" not in body["metadata"]
    assert "uid" not in body["metadata"]
    assert body["metadata"]["labels"][LABEL] == "uid-1"
    assert body["spec"]["schedulingGates"] == [{"name": GATE}]
    assert "nodeName" not in body["spec"]
    pin = {"key": "metadata.name", "operator": "In", "values": ["n2"]}
    assert _required(body) == [{"matchFields": [pin]}]


def test_the_pods_own_affinity_stays_beside_the_pin() -> None:
    disk = {"key": "disk", "operator": "In", "values": ["ssd"]}
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    own = {"nodeAffinity": {key: {"nodeSelectorTerms": [{"matchExpressions": [disk]}]}}}
    (term,) = _required(restored_pod(_pod(affinity=own), "other", "n2", "uid-1"))
    assert term["matchExpressions"] == [disk]
    assert term["matchFields"][0]["values"] == ["n2"]


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (None, Reason.POD_NOT_FOUND),
        (_pod() | {"status": {"phase": "Pending"}}, Reason.POD_NOT_RUNNING),
        (_pod(initContainers=[{"name": "x"}]), Reason.NOT_CHECKPOINTABLE),
        (_pod(containers=[{"name": "a"}, {"name": "b"}]), Reason.NOT_CHECKPOINTABLE),
        (_pod(containers=[{"name": "a", "startupProbe": {}}]), None),
        (
            _pod(containers=[{"name": "a", "lifecycle": {"postStart": {"exec": {}}}}]),
            Reason.NOT_CHECKPOINTABLE,
        ),
        (_pod(), None),
    ],
)
def test_pods_that_are_refused(pod: dict[str, Any] | None, reason: Reason | None) -> None:
    refused = obstacle_of(pod, "redis-0")
    assert (refused.reason if refused else None) == reason


def test_nowhere_is_said_only_of_what_is_nowhere() -> None:
    absent = Rejected(Reason.ARCHIVE_NOT_FOUND, "no archive")
    damaged = Rejected(Reason.ARCHIVE_DAMAGED, "it is cut")
    assert worst([("n1", absent), ("n2", absent)]).reason is Reason.ARCHIVE_NOT_FOUND
    assert worst([("n1", absent), ("n2", damaged)]).reason is Reason.ARCHIVE_DAMAGED
    assert worst([]).reason is Reason.NO_TARGET


@pytest.mark.parametrize(
    ("failure", "touched", "phase"),
    [
        (Rejected(Reason.ARCHIVE_KEY, ""), False, "Rejected"),
        (Rejected(Reason.ARCHIVE_KEY, ""), True, "Failed"),
        (Aborted(Reason.DUMP_FAILED, ""), False, "Failed"),
        (Retryable(Reason.TIMED_OUT, ""), True, "Failed"),
    ],
)
def test_rejected_says_that_nothing_was_touched(
    failure: GodwitError, touched: bool, phase: str
) -> None:
    assert phase_of(failure, touched=touched) == phase
