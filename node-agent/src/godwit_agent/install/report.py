"""What a node says of itself: label ``godwit.io/node``, condition ``GodwitReady``, an Event."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from godwit_agent.install.kube import MERGE, STRATEGIC, Api
from godwit_agent.install.runtime_config import Problem

LABEL = "godwit.io/node"
CONDITION = "GodwitReady"
COMPONENT = "godwit-node-agent"


def condition(problems: Sequence[Problem], known: Any, now: str) -> dict[str, str]:
    """The Node condition; the time of the transition stays while the status does. Pure."""
    status = "False" if problems else "True"
    kept = known is not None and known.get("status") == status
    return {
        "type": CONDITION,
        "status": status,
        "reason": problems[0].reason if problems else "Prepared",
        "message": "; ".join(problem.message for problem in problems)
        or "pods with RuntimeClass godwit can move from and to this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": known["lastTransitionTime"] if kept else now,
    }


def publish(api: Api, node: str, problems: Sequence[Problem]) -> None:
    """Label the node and set its condition; all problems are named. An Event tells a change."""
    found = api.call("GET", f"/api/v1/nodes/{node}")
    known = {item["type"]: item for item in found["status"].get("conditions", [])}.get(CONDITION)
    wanted = condition(problems, known, _now())
    told = ("status", "reason", "message")
    if known is None or any(known.get(key) != wanted[key] for key in told):
        body = {"status": {"conditions": [wanted]}}
        api.call("PATCH", f"/api/v1/nodes/{node}/status", body, STRATEGIC)
        api.call("POST", "/api/v1/namespaces/default/events", _event(found, wanted))
    value = "unprepared" if problems else "ready"
    if (found["metadata"].get("labels") or {}).get(LABEL) != value:
        _label(api, node, value)


def withdraw(api: Api, node: str) -> None:
    """Remove label and condition."""
    _label(api, node, None)
    body = {"status": {"conditions": [{"$patch": "delete", "type": CONDITION}]}}
    api.call("PATCH", f"/api/v1/nodes/{node}/status", body, STRATEGIC)


def _label(api: Api, node: str, value: str | None) -> None:
    api.call("PATCH", f"/api/v1/nodes/{node}", {"metadata": {"labels": {LABEL: value}}}, MERGE)


def _event(node: Any, wanted: dict[str, str]) -> dict[str, Any]:
    name = node["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{name[:200]}.godwit.", "namespace": "default"},
        # The kubelet's Events name the Node as its uid too; `kubectl describe node` finds both.
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Node",
            "name": name,
            "uid": node["metadata"]["uid"],
        },
        "type": "Normal" if wanted["status"] == "True" else "Warning",
        "reason": f"Godwit{wanted['reason']}",
        "message": wanted["message"][:1000],
        "source": {"component": COMPONENT, "host": name},
        "reportingComponent": COMPONENT,
        "reportingInstance": name,
        "firstTimestamp": wanted["lastHeartbeatTime"],
        "lastTimestamp": wanted["lastHeartbeatTime"],
        "count": 1,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
