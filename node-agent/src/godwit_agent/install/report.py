"""What a node says of itself: label ``godwit.io/node``, condition ``GodwitReady``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from godwit_agent.install.kube import MERGE, STRATEGIC, Api
from godwit_agent.install.runtime_config import Problem

LABEL = "godwit.io/node"
CONDITION = "GodwitReady"


def publish(api: Api, node: str, problems: Sequence[Problem]) -> None:
    """Label the node and set its condition; all problems are named."""
    value = "unprepared" if problems else "ready"
    _label(api, node, value)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {
        "type": CONDITION,
        "status": "False" if problems else "True",
        "reason": problems[0].reason if problems else "Prepared",
        "message": "; ".join(problem.message for problem in problems)
        or "pods with RuntimeClass godwit can move from and to this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    body = {"status": {"conditions": [condition]}}
    api.call("PATCH", f"/api/v1/nodes/{node}/status", body, STRATEGIC)


def withdraw(api: Api, node: str) -> None:
    """Remove label and condition."""
    _label(api, node, None)
    body = {"status": {"conditions": [{"$patch": "delete", "type": CONDITION}]}}
    api.call("PATCH", f"/api/v1/nodes/{node}/status", body, STRATEGIC)


def _label(api: Api, node: str, value: str | None) -> None:
    api.call("PATCH", f"/api/v1/nodes/{node}", {"metadata": {"labels": {LABEL: value}}}, MERGE)
