"""The CRD and the typed views agree; the API server refuses what is malformed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from contract.operator.apiserver import ApiServer
from godwit_api.migration import (
    Condition,
    Failure,
    Handover,
    ObstacleView,
    Phase,
    PhaseTransition,
    Spec,
    Status,
    Timeouts,
)
from godwit_operator.plan import Decision
from godwit_operator.status import encode, enter
from godwit_operator.steps import Step

ROOT = Path(__file__).resolve().parents[3]
CRD = yaml.safe_load((ROOT / "crds" / "podmigrations.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]


def closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden instead of pruned."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not free and "properties" in schema:
        made["additionalProperties"] = False
    return made


def fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


FULL = Status(
    observed_generation=1,
    phase=Phase.SUCCEEDED,
    step="Succeeded",
    epoch=2,
    reason="Succeeded",
    message="moved",
    pod_uid="u",
    pod_ip="10.0.0.1",
    pod_ips=["10.0.0.1", "fd00::1"],
    successor_name="p",
    successor_uid="s",
    source_node="a",
    target_node="b",
    freeze="90ms",
    freeze_milliseconds=90.5,
    predicted_freeze_milliseconds=80,
    predicted_total_seconds=1.5,
    dirty_bytes_per_second=1,
    bandwidth_bytes_per_second=1,
    cpu_percent=60,
    copy_seconds_left=0.5,
    transferred_bytes=1,
    remaining_bytes=1,
    post_copy_bytes=1,
    rounds=3,
    timings={"dump": 1},
    obstacles=[ObstacleView(reason="A", message="b")],
    conditions=[
        Condition(
            type="Ready", status="True", reason="A", last_transition_time="2026-01-01T00:00:00Z"
        )
    ],
    phase_transition_timestamps=[
        PhaseTransition(phase="Pending", timestamp="2026-01-01T00:00:00Z")
    ],
    handover=Handover(guarded=True, failure=Failure(reason="A", message="b")),
)


def test_status_fits_the_schema() -> None:
    body = encode(FULL)
    assert set(body) == fields(Status)  # nothing was left at its default
    jsonschema.validate(body, closed(SCHEMA["status"]))
    assert msgspec.convert(body, Status) == FULL


def test_the_schema_has_no_other_fields() -> None:
    assert set(SCHEMA["status"]["properties"]) == fields(Status)
    assert set(SCHEMA["spec"]["properties"]) == fields(Spec)
    assert set(SCHEMA["status"]["properties"]["phase"]["enum"]) == {str(phase) for phase in Phase}


def test_defaults_are_the_same() -> None:
    declared = SCHEMA["spec"]["properties"]["timeouts"]["properties"]
    defaults = msgspec.to_builtins(Timeouts())
    assert {name: item["default"] for name, item in declared.items()} == (
        defaults or {f.encode_name: f.default for f in msgspec.structs.fields(Timeouts)}
    )


@pytest.mark.parametrize("step", Step)
def test_every_step_makes_a_valid_status(step: Step) -> None:
    from godwit_api.migration import Metadata, PodMigration

    migration = PodMigration(metadata=Metadata(generation=3), spec=Spec(pod_name="p"))
    failure = Failure(reason="TimedOut", message="late")
    for failed in (None, failure):
        status = enter(migration, Status(), Decision(step, failed), 1e9)
        jsonschema.validate(encode(status), closed(SCHEMA["status"]))
        kinds = {c.type: c.status for c in status.conditions}
        ended = status.phase in {"Succeeded", "Rejected", "Aborted", "Stalled"}
        assert kinds["Reconciling"] == ("False" if ended else "True")
        assert (kinds["Stalled"] == "True") is (ended and step is not Step.SUCCEEDED)
        assert kinds["Ready"] == ("True" if step is Step.SUCCEEDED else "False")
        assert status.observed_generation == 3


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no pod": ({"target": {"nodeName": "n1"}}, "spec.podName"),
    "empty pod": ({"podName": ""}, "spec.podName"),
    "bad pod name": ({"podName": "A_b"}, "spec.podName"),
    "long pod name": ({"podName": "a" * 254}, "spec.podName"),
    "two targets": (
        {"podName": "a", "target": {"nodeName": "n1", "nodeSelector": {"a": "b"}}},
        "spec.target",
    ),
    "empty selector": (
        {"podName": "a", "target": {"nodeSelector": {}}},
        "spec.target.nodeSelector",
    ),
    "negative budget": ({"podName": "a", "freezeBudgetMilliseconds": -1}, "freezeBudget"),
    "budget as text": ({"podName": "a", "freezeBudgetMilliseconds": "x"}, "freezeBudget"),
    "no bandwidth": ({"podName": "a", "bandwidthLimit": 0}, "spec.bandwidthLimit"),
    "bandwidth as words": ({"podName": "a", "bandwidthLimit": "fast"}, "spec.bandwidthLimit"),
    "compression": ({"podName": "a", "compression": "lz4"}, "spec.compression"),
    "convergence": ({"podName": "a", "convergence": "Wait"}, "spec.convergence"),
    "throttle without budget": ({"podName": "a", "convergence": "Throttle"}, "freezeBudget"),
    "timeout": ({"podName": "a", "timeouts": {"copySeconds": 0}}, "spec.timeouts.copySeconds"),
    "unknown field": ({"podName": "a", "nodeName": "b"}, "spec.nodeName"),
}


def manifest(name: str, spec: dict[str, Any]) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": "PodMigration",
            "metadata": {"name": name, "namespace": "default"},
            "spec": spec,
        }
    )


@pytest.mark.host
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_specs_are_refused_with_their_field(apiserver: ApiServer, case: str) -> None:
    spec, field = MALFORMED[case]
    with pytest.raises(RuntimeError) as refused:
        apiserver.kubectl("create", "-f", "-", stdin=manifest("bad", spec))
    assert field in str(refused.value)


@pytest.mark.host
def test_the_spec_is_immutable_and_the_status_begins_unobserved(apiserver: ApiServer) -> None:
    apiserver.kubectl("create", "-f", "-", stdin=manifest("good", {"podName": "p"}))
    try:
        path = "-o=jsonpath={.status.observedGeneration}"
        assert apiserver.kubectl("get", "pmig", "good", path) == "-1"
        for patch in ('{"spec":{"podName":"q"}}', '{"spec":{"target":{"nodeName":"n"}}}'):
            with pytest.raises(RuntimeError) as refused:
                apiserver.kubectl("patch", "pmig", "good", "--type=merge", "-p", patch)
            assert "spec is immutable" in str(refused.value)
    finally:
        apiserver.kubectl("delete", "pmig", "good")
