"""What the node says of itself, and the retirement of all nodes."""

from __future__ import annotations

import json
import urllib.error
from email.message import Message
from typing import Any

import pytest

from godwit_agent.install import report, retire
from godwit_agent.install.runtime_config import Problem
from unit.install.fake_node import FakeApi

NODE = "/api/v1/nodes/n1"
PROBLEMS = [Problem("NetworkNotRouted", "calico"), Problem("NodeNotPrepared", "no runc")]


def api(*conditions: Any, label: str | None = None) -> FakeApi:
    labels = {"godwit.io/node": label} if label else {}
    return FakeApi(
        {
            NODE: {
                "metadata": {"name": "n1", "uid": "u1", "labels": labels},
                "status": {"conditions": list(conditions)},
            }
        }
    )


def known(status: str, reason: str, message: str) -> dict[str, str]:
    return {
        "type": "GodwitReady", "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def test_an_unprepared_node_names_all_problems() -> None:
    server = api({"type": "Ready", "status": "True"})
    report.publish(server, "n1", PROBLEMS)
    (status,) = server.bodies("PATCH", "/status")
    (made,) = status["status"]["conditions"]
    assert (made["type"], made["status"], made["reason"], made["message"]) == (
        "GodwitReady", "False", "NetworkNotRouted", "calico; no runc",
    )  # fmt: skip
    (event,) = server.bodies("POST", "/events")
    assert (event["type"], event["reason"]) == ("Warning", "GodwitNetworkNotRouted")
    assert event["involvedObject"]["name"] == "n1"
    (label,) = server.bodies("PATCH", "/n1")
    assert label == {"metadata": {"labels": {"godwit.io/node": "unprepared"}}}


def test_a_prepared_node() -> None:
    server = api()
    report.publish(server, "n1", [])
    (event,) = server.bodies("POST", "/events")
    assert (event["type"], event["reason"]) == ("Normal", "GodwitPrepared")
    (label,) = server.bodies("PATCH", "/n1")
    assert label == {"metadata": {"labels": {"godwit.io/node": "ready"}}}


def test_nothing_new_is_not_said_again() -> None:
    server = api(known("False", "NetworkNotRouted", "calico; no runc"), label="unprepared")
    report.publish(server, "n1", PROBLEMS)
    assert server.calls == []


def test_the_time_of_the_transition_is_that_of_the_status() -> None:
    server = api(known("False", "NodeNotPrepared", "other"), label="unprepared")
    report.publish(server, "n1", PROBLEMS)
    (status,) = server.bodies("PATCH", "/status")
    assert status["status"]["conditions"][0]["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    report.publish(server, "n1", [])
    status = server.bodies("PATCH", "/status")[-1]
    assert status["status"]["conditions"][0]["lastTransitionTime"] != "2026-01-01T00:00:00Z"


def test_withdrawing_removes_label_and_condition() -> None:
    server = api()
    report.withdraw(server, "n1")
    assert server.calls == [
        ("PATCH", NODE, {"metadata": {"labels": {"godwit.io/node": None}}}),
        (
            "PATCH",
            f"{NODE}/status",
            {"status": {"conditions": [{"$patch": "delete", "type": "GodwitReady"}]}},
        ),
    ]


PODS = "/api/v1/namespaces/sys/pods"
DAEMON_SET = "/apis/apps/v1/namespaces/sys/daemonsets/agents"
ENVIRONMENT = {
    "GODWIT_NAMESPACE": "sys",
    "GODWIT_POD_NAME": "job-pod",
    "GODWIT_POD_UID": "job-uid",
    "GODWIT_DAEMON_SET": "agents",
    "GODWIT_AGENT_SELECTOR": "a=b",
    "GODWIT_RETIRE_POD": json.dumps(
        {"metadata": {"labels": {"x": "y"}}, "spec": {"containers": ["c"]}}
    ),
}


class Cluster(FakeApi):
    """Pods that undo a node succeed at once, but for nodes in ``broken``."""

    def __init__(self, nodes: dict[str, str], pods: list[Any] | None = None) -> None:
        super().__init__()
        self.nodes = nodes
        self.pods = pods or []
        self.broken: set[str] = set()

    def call(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> Any:
        if method != "GET":
            if path == DAEMON_SET and "gone" in self.nodes:
                raise urllib.error.HTTPError(path, 404, "not found", Message(), None)
            return super().call(method, path, body, content)
        if path.startswith("/api/v1/pods?"):
            # Two pages: the second has what matters.
            if "continue=&" in path or path.endswith("continue="):
                return {"items": [], "metadata": {"continue": "next"}}
            return {"items": self.pods, "metadata": {}}
        if path.startswith("/api/v1/nodes?"):
            return {"items": [self._node(*item) for item in self.nodes.items()], "metadata": {}}
        if path.startswith(f"{PODS}?labelSelector=a=b"):
            return {"items": []}
        node = path.removeprefix(f"{PODS}/godwit-retire-")
        if node in self.broken:
            ended = {"terminated": {"message": "containers still use the runtime handler: c1\n"}}
            return {"status": {"phase": "Running", "containerStatuses": [{"lastState": ended}]}}
        return {"status": {"phase": "Succeeded"}}

    def _node(self, name: str, ready: str) -> Any:
        labels = {} if name == "bare" else {"godwit.io/node": "ready"}
        return {
            "metadata": {"name": name, "labels": labels},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }

    def started(self) -> list[str]:
        return [body["spec"]["nodeName"] for body in self.bodies("POST", "/pods")]

    def selectors(self) -> list[Any]:
        patches = self.bodies("PATCH", "/daemonsets/agents")
        return [patch["spec"]["template"]["spec"]["nodeSelector"] for patch in patches]


def pod(name: str, runtime_class: str | None, phase: str = "Running") -> Any:
    spec = {"runtimeClassName": runtime_class} if runtime_class else {}
    return {
        "metadata": {"namespace": "ns", "name": name}, "spec": spec, "status": {"phase": phase}
    }  # fmt: skip


def run(cluster: Cluster) -> int:
    return retire.Retirement(cluster, ENVIRONMENT).run()


def test_every_prepared_node_is_undone_after_its_agents_have_ended() -> None:
    cluster = Cluster({"n1": "True", "n2": "True", "bare": "True"}, [pod("p", None)])
    assert run(cluster) == 0
    assert cluster.started() == ["n1", "n2"]
    assert cluster.calls[0][:2] == ("PATCH", DAEMON_SET)
    assert cluster.selectors() == [{"godwit.io/retired": "true"}]
    deleted = [path for verb, path, _ in cluster.calls if verb == "DELETE"]
    assert deleted == [
        f"{PODS}/godwit-retire-n1",
        f"{PODS}/godwit-retire-n2",
        "/api/v1/namespaces/sys/secrets/godwit-ca",
        "/api/v1/namespaces/sys/configmaps/godwit-ca",
    ]
    (first, _) = cluster.bodies("POST", "/pods")
    assert first["metadata"]["labels"] == {"x": "y"}
    assert first["metadata"]["ownerReferences"][0]["uid"] == "job-uid"


def test_pods_of_the_class_stop_it_before_anything_is_touched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pods = [pod("a", "godwit"), pod("b", "kata"), pod("done", "godwit", "Succeeded"),
            pod("waiting", "godwit", "Pending")]  # fmt: skip
    cluster = Cluster({"n1": "True"}, pods)
    assert run(cluster) == 1
    assert cluster.calls == []
    assert "ns/a, ns/waiting;" in capsys.readouterr().err


def test_nodes_that_are_away_are_named_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster({"n1": "True", "dead": "Unknown"})
    assert run(cluster) == 0
    assert cluster.started() == ["n1"]
    assert "not Ready, so left as they are: dead" in capsys.readouterr().err


def test_a_node_that_fails_brings_the_agents_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retire, "_NODES_SECONDS", 0.0)
    cluster = Cluster({"n1": "True", "n2": "True"})
    cluster.broken = {"n2"}
    assert run(cluster) == 1
    assert "n2 is not undone: containers still use" in capsys.readouterr().err
    assert cluster.selectors() == [{"godwit.io/retired": "true"}, {"godwit.io/retired": None}]
    deleted = [path for verb, path, _ in cluster.calls if verb == "DELETE"]
    assert deleted == [f"{PODS}/godwit-retire-n1", f"{PODS}/godwit-retire-n2"]


def test_a_daemon_set_that_is_gone_is_no_obstacle() -> None:
    cluster = Cluster({"gone": "True"})
    assert run(cluster) == 0
    assert cluster.started() == ["gone"]


def test_names_of_pods_stay_names() -> None:
    assert retire.pod_name("n1") == "godwit-retire-n1"
    long = [retire.pod_name(f"{'a' * 60}.{zone}.example.internal") for zone in ("eu", "us")]
    assert len(set(long)) == 2
    assert all(len(name) <= 63 and not name.endswith((".", "-")) for name in long)
