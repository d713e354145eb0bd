"""``helm uninstall`` starts this first: undo the installation on every node.

One short-lived privileged pod per node runs ``uninstall``. Nodes where pods
still use the runtime handler are not touched, and the uninstall stops with
their names: without the handler those pods could not be stopped any more.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
from typing import Any

from godwit_agent.install.kube import Api
from godwit_agent.install.report import LABEL

_TIMEOUT_SECONDS = 240


def users(api: Api) -> list[str]:
    """Pods that use the runtime class, as ``namespace/name``."""
    pods = api.call("GET", "/api/v1/pods")["items"]
    return [
        f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        for pod in pods
        if pod["spec"].get("runtimeClassName") == "godwit"
        and pod["status"].get("phase") not in ("Succeeded", "Failed")
    ]


def pod_for(node: str, namespace: str, image: str, pull_policy: str, account: str) -> Any:
    """The pod that undoes the installation on one node."""
    field = {"fieldRef": {"fieldPath": "spec.nodeName"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"godwit-retire-{node}",
            "namespace": namespace,
            "labels": {"app.kubernetes.io/component": "retire"},
        },
        "spec": {
            "nodeName": node,
            "hostPID": True,
            "hostNetwork": True,
            "restartPolicy": "OnFailure",
            "serviceAccountName": account,
            "tolerations": [{"operator": "Exists"}],
            "containers": [
                {
                    "name": "retire",
                    "image": image,
                    "imagePullPolicy": pull_policy,
                    "command": ["python3", "-m", "godwit_agent.install", "uninstall"],
                    "env": [
                        {"name": "GODWIT_NODE_NAME", "valueFrom": field},
                        {
                            "name": "GODWIT_RESTART_COMMAND",
                            "value": os.environ["GODWIT_RESTART_COMMAND"],
                        },
                    ],
                    "securityContext": {"privileged": True},
                }
            ],
        },
    }


def retire(api: Api) -> int:
    """Undo everywhere; 1 with the reason when that cannot be done."""
    if still := users(api):
        sys.stderr.write(
            f"these pods still use RuntimeClass godwit: {', '.join(still[:20])}; delete them or "
            "give them another runtime class, then uninstall again\n"
        )
        return 1
    namespace = os.environ["GODWIT_NAMESPACE"]
    image, policy = os.environ["GODWIT_IMAGE"], os.environ["GODWIT_PULL_POLICY"]
    account = os.environ["GODWIT_AGENT_ACCOUNT"]
    nodes = [
        item["metadata"]["name"]
        for item in api.call("GET", f"/api/v1/nodes?labelSelector={LABEL}")["items"]
    ]
    base = f"/api/v1/namespaces/{namespace}/pods"
    for node in nodes:
        try:
            api.call("POST", base, pod_for(node, namespace, image, policy, account))
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    waiting = set(nodes)
    while waiting and time.monotonic() < deadline:
        for node in sorted(waiting):
            pod = api.call("GET", f"{base}/godwit-retire-{node}")
            if pod["status"].get("phase") == "Succeeded":
                api.call("DELETE", f"{base}/godwit-retire-{node}")
                waiting.discard(node)
        time.sleep(0.5)
    if waiting:
        sys.stderr.write(f"not undone in {_TIMEOUT_SECONDS} s on: {', '.join(sorted(waiting))}\n")
        return 1
    return 0
