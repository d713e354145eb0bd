"""What the operator decides about checkpoints and restores, without a cluster."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.pods import Node
from godwit_api.reasons import Reason
from godwit_operator.archives import key_of, store_of
from godwit_operator.checkpoint import refusal, rival
from godwit_operator.checkpoint_status import phase_of
from godwit_operator.restore import GATE, LABEL, require_fit, restored_pod, worst
from godwit_operator.targets import Free
from godwit_operator.volumes import Storage


def _pod(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "redis-0",
            "namespace": "shop",
            "uid": "u",
            "ownerReferences": [{"kind": "StatefulSet", "name": "redis", "uid": "o"}],
        },
        "spec": {
            "nodeName": "n1",
            "runtimeClassName": "godwit",
            "containers": [{"name": "redis"}],
            **spec,
        },
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


_HOOK = {"lifecycle": {"postStart": {"exec": {"command": ["warm"]}}}}


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (None, Reason.POD_NOT_FOUND),
        (_pod() | {"status": {"phase": "Pending"}}, Reason.POD_NOT_RUNNING),
        (_pod(runtimeClassName="runc"), Reason.WRONG_RUNTIME_CLASS),
        (_pod(hostPID=True), Reason.HOST_PID),
        (_pod(volumes=[{"name": "v", "hostPath": {"path": "/v"}}]), Reason.VOLUME_CANNOT_FOLLOW),
        (_pod(), None),
        (_pod(initContainers=[{"name": "x"}]), None),
        (_pod(containers=[{"name": "a"}, {"name": "b", "startupProbe": {}}]), None),
        (_pod(containers=[{"name": "a", **_HOOK}]), None),
    ],
)
def test_pods_that_are_refused(pod: dict[str, Any] | None, reason: Reason | None) -> None:
    refused = refusal(pod, "redis-0", Storage())
    assert (refused.reason if refused else None) == reason


def test_a_checkpoint_replaces_nothing_so_the_owner_does_not_matter() -> None:
    pod = _pod()
    pod["metadata"]["ownerReferences"] = [
        {"kind": "Job", "name": "j", "uid": "o", "controller": True}
    ]
    pod["metadata"]["finalizers"] = ["example.org/wait"]
    assert refusal(pod, "redis-0", Storage()) is None


def test_all_that_is_wrong_is_told_at_once() -> None:
    refused = refusal(_pod(hostPID=True, hostIPC=True), "redis-0", Storage())
    assert refused
    assert "hostPID" in refused.message
    assert "hostIPC" in refused.message


def _checkpoint(name: str, created: str, phase: str = "", **spec: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": name, "creationTimestamp": created},
        "spec": spec,
        "status": {"phase": phase} if phase else {},
    }


@pytest.mark.parametrize(
    ("other", "wins"),
    [
        (_checkpoint("mine", "1"), True),
        (_checkpoint("other", "1", archive="mine"), True),
        (_checkpoint("other", "1", "Writing", archive="mine"), True),
        (_checkpoint("other", "1", "Failed", archive="mine"), False),
        (_checkpoint("other", "3", archive="mine"), False),
        (_checkpoint("other", "1"), False),
        (_checkpoint("other", "1", archive="mine", storeSecretName="s3"), False),
    ],
)
def test_one_archive_is_written_by_one(other: dict[str, Any], wins: bool) -> None:
    mine = _checkpoint("mine", "2")
    assert rival(mine, [mine, other]) == (other if wins else None)


def _secret(**entries: str) -> dict[str, Any]:
    data = {name: base64.b64encode(text.encode()).decode() for name, text in entries.items()}
    return {
        "metadata": {"name": "s"},
        "data": {name.replace("_", "."): d for name, d in data.items()},
    }


_STORE = {
    "endpoint": "https://s3.example.org",
    "bucket": "pods",
    "accessKey": "a",
    "secretKey": "b",
}


def test_a_store_is_read_from_its_secret() -> None:
    store = store_of(_secret(**_STORE))
    assert (store.endpoint, store.bucket, store.prefix) == ("https://s3.example.org", "pods", "")
    assert (store.region, store.access_key, store.secret_key) == ("us-east-1", "a", "b")
    more = _secret(**_STORE, prefix="a/b", region="eu-1", ca_crt="-----BEGIN CERTIFICATE-----")
    store = store_of(more)
    assert (store.prefix, store.region) == ("a/b", "eu-1")
    assert store.ca_pem.startswith("-----BEGIN")
    assert "'b'" not in repr(store)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"endpoint": "s3.example.org"}, "endpoint"),
        ({"endpoint": "https://s3.example.org/path"}, "endpoint"),
        ({"endpoint": "https://u:p@s3.example.org"}, "endpoint"),
        ({"bucket": "No"}, "bucket"),
        ({"bucket": ""}, "bucket"),
        ({"prefix": "/a"}, "prefix"),
        ({"prefix": "a//b"}, "prefix"),
        ({"region": "a b"}, "region"),
        ({"accessKey": ""}, "accessKey"),
        ({"secretKey": "a\n"}, "secretKey"),
        ({"ca_crt": "none"}, "ca.crt"),
        ({"accesskey": "a"}, "accesskey is no entry"),
    ],
)
def test_what_is_wrong_with_a_store_is_told(change: dict[str, str], told: str) -> None:
    with pytest.raises(Rejected) as refused:
        store_of(_secret(**{**_STORE, **change}))
    assert refused.value.reason is Reason.ARCHIVE_STORE
    assert told in refused.value.message


def test_all_faults_of_a_store_at_once() -> None:
    with pytest.raises(Rejected) as refused:
        store_of(_secret())
    for entry in ("endpoint", "bucket", "accessKey", "secretKey"):
        assert entry in refused.value.message


@pytest.mark.parametrize("data", [{}, {"key": "AAAA"}, {"key": "!"}, None])
def test_a_key_has_32_bytes(data: dict[str, str] | None) -> None:
    with pytest.raises(Rejected) as refused:
        key_of({"metadata": {"name": "k"}, "data": data})
    assert refused.value.reason is Reason.ARCHIVE_KEY


def test_a_node_that_would_never_start_the_pod_is_passed_over() -> None:
    node = {
        "metadata": {"name": "n", "labels": {"godwit.io/node": "ready"}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    room = Free(Decimal(1), Decimal(1))
    require_fit(msgspec.convert(node, Node), _pod(), ["n"], room)
    node["spec"] = {"unschedulable": True}
    with pytest.raises(Rejected) as refused:
        require_fit(msgspec.convert(node, Node), _pod(), ["n"], room)
    assert refused.value.reason is Reason.TARGET_UNSCHEDULABLE


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
