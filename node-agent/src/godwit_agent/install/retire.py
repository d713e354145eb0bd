"""``helm uninstall`` starts this first: undo the installation on every node.

The agents are ended, then one short-lived privileged pod per node runs
``uninstall``. While pods use the runtime handler nothing is touched and the
uninstall stops with their names: without the handler nothing could stop them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from godwit_agent.install.kube import MERGE, Api
from godwit_agent.install.report import LABEL

_AGENTS_SECONDS = 60.0
_NODES_SECONDS = 180.0
_PAGE = 500
Object = dict[str, Any]


def users(pods: Iterator[Object]) -> list[str]:
    """Pods that use the runtime class, as ``namespace/name``. Pure."""
    return [
        f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        for pod in pods
        if pod["spec"].get("runtimeClassName") == "godwit"
        and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
    ]


def reachable(node: Object) -> bool:
    """Whether the node's kubelet can start a pod now. Pure."""
    conditions = node.get("status", {}).get("conditions", [])
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def pod_name(node: str) -> str:
    """Name of the pod that works on ``node``; node names may be as long as pod names may be."""
    name = f"godwit-retire-{node}"
    if len(name) <= 63:
        return name
    return f"{name[:54].rstrip('-.')}-{hashlib.sha256(node.encode()).hexdigest()[:8]}"


def pod_for(node: str, template: Object, owner: Object) -> Object:
    """The pod that undoes the installation on one node; it goes when ``owner`` goes. Pure."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": pod_name(node), "ownerReferences": [owner]},
        "spec": {**template["spec"], "nodeName": node},
    }


def pages(api: Api, path: str) -> Iterator[Object]:
    """All objects of a list, a page at a time."""
    token = ""
    while True:
        page = api.call("GET", f"{path}?limit={_PAGE}&continue={token}")
        yield from page["items"]
        token = page["metadata"].get("continue", "")
        if not token:
            return


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll; False when the time is over."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


class Retirement:
    """One run of the job."""

    def __init__(self, api: Api, environment: Mapping[str, str]) -> None:
        self._api = api
        self._template = json.loads(environment["GODWIT_RETIRE_POD"])
        self._agents = environment["GODWIT_AGENT_SELECTOR"]
        self._daemon_set = environment["GODWIT_DAEMON_SET"]
        namespace = environment["GODWIT_NAMESPACE"]
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._authority = [
            f"/api/v1/namespaces/{namespace}/{kind}/godwit-ca" for kind in ("secrets", "configmaps")
        ]
        self._apps = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
        self._started: list[str] = []
        self._owner = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": environment["GODWIT_POD_NAME"],
            "uid": environment["GODWIT_POD_UID"],
        }

    def run(self) -> int:
        """Undo everywhere; 1 with the reason when that cannot be done."""
        if still := users(pages(self._api, "/api/v1/pods")):
            _say(
                f"these pods still use RuntimeClass godwit: {', '.join(still[:20])}; delete them "
                "or give them another runtime class, then uninstall again"
            )
            return 1
        found = list(pages(self._api, "/api/v1/nodes"))
        marked = [node for node in found if LABEL in (node["metadata"].get("labels") or {})]
        here = [node["metadata"]["name"] for node in marked if reachable(node)]
        away = [node["metadata"]["name"] for node in marked if not reachable(node)]
        failed = dict.fromkeys(here, "")
        self._end_agents()
        try:
            for node in here:
                self._start(node)
            failed = self._wait(here)
        finally:
            if failed:
                self._revive_agents()
        if not failed:
            for path in self._authority:  # the operator made them, so Helm does not know them
                self._call_unless_gone("DELETE", path)
        if away:
            _say(f"not Ready, so left as they are: {', '.join(away)}")
        for node, message in failed.items():
            _say(f"{node} is not undone: {message}")
        return 1 if failed else 0

    def _end_agents(self) -> None:
        """No agent, and no installer that would prepare the node again."""
        self._select_nodes("true")
        listed = f"{self._pods}?labelSelector={self._agents}"

        def ended() -> bool:
            return not any(
                pod["status"].get("phase") == "Running"
                for pod in self._api.call("GET", listed)["items"]
            )

        if not until(ended, _AGENTS_SECONDS):
            _say("agents that do not end are left behind; their nodes are undone all the same")

    def _revive_agents(self) -> None:
        """The release is still installed: its agents come back, and prepare their nodes."""
        for node in list(self._started):
            self._call_unless_gone("DELETE", f"{self._pods}/{pod_name(node)}")
        self._select_nodes(None)

    def _select_nodes(self, value: str | None) -> None:
        selector = {"nodeSelector": {"godwit.io/retired": value}}
        patch = {"spec": {"template": {"spec": selector}}}
        self._call_unless_gone("PATCH", f"{self._apps}/{self._daemon_set}", patch)

    def _call_unless_gone(self, method: str, path: str, body: Any = None) -> None:
        try:
            self._api.call(method, path, body, MERGE)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise

    def _start(self, node: str) -> None:
        self._started.append(node)
        try:
            self._api.call("POST", self._pods, pod_for(node, self._template, self._owner))
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise

    def _wait(self, nodes: list[str]) -> dict[str, str]:
        """What the pods of nodes that are not undone said last."""
        waiting = dict.fromkeys(nodes, "its pod did not start")

        def done() -> bool:
            for node in list(waiting):
                path = f"{self._pods}/{pod_name(node)}"
                status = self._api.call("GET", path)["status"]
                if status.get("phase") == "Succeeded":
                    self._api.call("DELETE", path)
                    self._started.remove(node)
                    del waiting[node]
                elif said := _last_words(status):
                    waiting[node] = said
            return not waiting

        until(done, _NODES_SECONDS)
        return waiting


def _last_words(status: Object) -> str:
    for container in status.get("containerStatuses", []):
        for state in (container.get("state", {}), container.get("lastState", {})):
            for kind in ("terminated", "waiting"):
                if message := state.get(kind, {}).get("message"):
                    return str(message).strip()
    return ""


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def retire(api: Api) -> int:
    """Entry of the job."""
    return Retirement(api, os.environ).run()
