"""Pods of several containers move as one; what has been run once is not run again."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.support import Scene
from lab import workloads
from lab.cluster import LAB_IMAGE

pytestmark = pytest.mark.bridged

Object = dict[str, Any]
CRIU = "/opt/godwit/criu/criu"
SHARED = [{"name": "shared", "mountPath": "/shared"}]
WRITER = "i=0; while :; do i=$((i+1)); echo $i; echo $i >> /shared/numbers; sleep 0.05; done"


def _container(name: str, *command: str, **fields: Any) -> Object:
    return {
        "name": name,
        "image": LAB_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "volumeMounts": SHARED,
        **fields,
    }


def _append(file: str) -> list[str]:
    return ["sh", "-c", f"echo once >> /shared/{file}"]


def _exec(*command: str, **fields: Any) -> Object:
    return {"exec": {"command": list(command)}, **fields}


def _pod(scene: Scene, kind: str = "stateful_set") -> tuple[Object, Object]:
    """Redis and a volume that its other containers share: the object, and its pod's spec."""
    made = getattr(workloads, kind)("redis", scene.namespace, node=scene.nodes[0])
    spec = made["spec"]["template"]["spec"] if kind != "bare_pod" else made["spec"]
    spec["volumes"] = [{"name": "shared", "emptyDir": {}}]
    spec["containers"][0]["volumeMounts"] = SHARED
    return made, spec


def _run(scene: Scene, pod: str, container: str, *command: str) -> str:
    words = ("exec", pod, "-n", scene.namespace, "-c", container, "--", *command)
    return scene.cluster.kubectl(*words)


def _lines(scene: Scene, pod: str, file: str) -> list[str]:
    return _run(scene, pod, "redis", "sh", "-c", f"cat /shared/{file} 2>/dev/null || true").split()


def _restarts(scene: Scene, pod: str) -> dict[str, int]:
    status = scene.pod(pod)["status"]
    both = (*status["containerStatuses"], *status.get("initContainerStatuses", ()))
    return {item["name"]: item["restartCount"] for item in both}


def test_two_containers_and_what_they_share(scene: Scene) -> None:
    made, spec = _pod(scene)
    part = [*SHARED, {"name": "parts", "mountPath": "/part", "subPath": "writers"}]
    spec["volumes"].append({"name": "parts", "emptyDir": {"medium": "Memory"}})
    spec["containers"].append(
        _container("writer", "sh", "-c", f"echo mine > /part/file; {WRITER}", volumeMounts=part)
    )
    scene.cluster.apply(made)
    pod = scene.ready_pod("redis")
    address = scene.pod(pod)["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        for target in (scene.nodes[1], scene.nodes[0]):
            before = len(_lines(scene, pod, "numbers"))
            scene.must_succeed(pod, target)
            scene.ready_pod("redis")
            assert scene.pod(pod)["spec"]["nodeName"] == target
            numbers = _lines(scene, pod, "numbers")
            assert len(numbers) > before
            assert numbers == [str(i + 1) for i in range(len(numbers))]
            assert _run(scene, pod, "writer", "cat", "/part/file") == "mine\n"
            said = scene.cluster.kubectl("logs", pod, "-n", scene.namespace, "-c", "writer").split()
            assert len(said) >= len(numbers)
            assert said == [str(i + 1) for i in range(len(said))]
            assert _restarts(scene, pod) == {"redis": 0, "writer": 0}
        report = client.stop()
    assert report["ok"], report


def test_what_has_been_run_is_not_run_again(scene: Scene) -> None:
    """Init containers and hooks; probes that allow nothing do not end a container that waits."""
    made, spec = _pod(scene)
    strict = {"periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 5}
    spec["initContainers"] = [
        _container("prepare", *_append("prepared"), resources={"limits": {"memory": "32Mi"}}),
        _container(
            "sidecar",
            *("redis-server", "--port", "6380", "--save", ""),
            restartPolicy="Always",
            startupProbe=_exec(
                "redis-cli", "-p", "6380", "ping", **strict | {"failureThreshold": 30}
            ),
            livenessProbe=_exec("redis-cli", "-p", "6380", "ping", **strict),
        ),
        _container(
            "check",
            *_append("checked"),
            securityContext={"runAsUser": 0, "readOnlyRootFilesystem": True},
        ),
    ]
    spec["containers"][0].update(
        lifecycle={
            "postStart": _exec(*_append("post-start")),
            "preStop": _exec(*_append("pre-stop")),
        },
        livenessProbe=_exec("redis-cli", "ping", **strict),
        startupProbe=_exec("redis-cli", "ping", **strict | {"failureThreshold": 30}),
    )
    spec["containers"].append(
        _container(
            "writer",
            *("sh", "-c", f"echo started; {WRITER}"),
            livenessProbe=_exec(
                "test", "-s", "/shared/numbers", **strict | {"failureThreshold": 3}
            ),
            lifecycle={
                "postStart": _exec("sh", "-c", "sleep 0.2; echo once >> /shared/post-start")
            },
        )
    )
    scene.cluster.apply(made)
    pod = scene.ready_pod("redis")
    address = scene.pod(pod)["status"]["podIP"]
    _run(scene, pod, "sidecar", "redis-cli", "-p", "6380", "set", "kept", "here")
    with scene.cluster.counter(address) as client:
        for target in (scene.nodes[1], scene.nodes[0]):
            scene.must_succeed(pod, target)
            scene.ready_pod("redis")
            assert _lines(scene, pod, "prepared") == ["once"]
            assert _lines(scene, pod, "checked") == ["once"]
            assert _lines(scene, pod, "post-start") == ["once", "once"]
            assert _lines(scene, pod, "pre-stop") == []
            numbers = _lines(scene, pod, "numbers")
            assert numbers == [str(i + 1) for i in range(len(numbers))]
            kept = _run(scene, pod, "sidecar", "redis-cli", "-p", "6380", "get", "kept")
            assert kept.strip() == "here"
            assert set(_restarts(scene, pod).values()) == {0}
        report = client.stop()
    assert report["ok"], report
    # a probe of a container that waits cannot be made, which does not count as failed
    told = [event["message"] for event in scene.events("Pod", pod)]
    assert [text for text in told if "probe failed" in text or "failed liveness" in text] == []


def _terminated(scene: Scene, pod: str, container: str) -> Object:
    """Wait for the first restart of a container, and return how it had ended."""
    scene.cluster.kubectl(
        *("wait", "pod", pod, "-n", scene.namespace, "--timeout=90s"),
        f"--for=jsonpath={{.status.containerStatuses[?(@.name=='{container}')].restartCount}}=1",
    )
    statuses = scene.pod(pod)["status"]["containerStatuses"]
    (found,) = (one for one in statuses if one["name"] == container)
    return dict(found["lastState"]["terminated"])


def test_limits_environment_and_ends_are_those_of_any_pod(scene: Scene) -> None:
    made, spec = _pod(scene)
    field = {"fieldRef": {"fieldPath": "status.podIP"}}
    spec["containers"][0].update(
        resources={"limits": {"memory": "64Mi", "cpu": "500m"}},
    )
    environment = [{"name": "PLAIN", "value": "kept"}, {"name": "ADDRESS", "valueFrom": field}]
    leave = "while [ ! -e /shared/leave ]; do sleep 0.1; done; rm /shared/leave; exit 3"
    spec["containers"].append(_container("leaver", "sh", "-c", leave, env=environment))
    labels = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    spec["volumes"].append({"name": "about", "downwardAPI": {"items": [labels]}})
    spec["containers"][0]["volumeMounts"] = [*SHARED, {"name": "about", "mountPath": "/about"}]
    scene.cluster.apply(made)
    pod = scene.ready_pod("redis")
    address = scene.pod(pod)["status"]["podIP"]
    scene.must_succeed(pod, scene.nodes[1])
    scene.ready_pod("redis")

    # Redis writes over its own
    kept = _run(scene, pod, "leaver", "cat", "/proc/1/environ").split("\0")
    assert {"PLAIN=kept", f"ADDRESS={address}"} <= set(kept)
    assert 'app="redis"' in _run(scene, pod, "redis", "cat", "/about/labels")
    _run(scene, pod, "redis", "touch", "/shared/leave")
    assert _terminated(scene, pod, "leaver")["exitCode"] == 3
    scene.cluster.redis(address, "SET", "alive", "1")
    words = ("redis-cli", "debug", "populate", "200000", "key", "1000")
    scene.cluster.kubectl(
        "exec", pod, "-n", scene.namespace, "-c", "redis", "--", *words, check=False
    )
    ended = _terminated(scene, pod, "redis")
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")
    scene.cluster.wait_ready(pod, scene.namespace)


def test_one_copy_that_fails_ends_the_others(scene: Scene) -> None:
    """The images of one container are damaged: the pod goes on at home, all of it."""
    source, target = scene.nodes[:2]
    made, spec = _pod(scene)
    spec["containers"].append(_container("writer", "sh", "-c", WRITER))
    scene.cluster.apply(made)
    pod = scene.ready_pod("redis")
    address = scene.pod(pod)["status"]["podIP"]
    sabotage = (
        f"mv {CRIU} {CRIU}.real; cat > {CRIU} <<'EOF'\n"
        "#!/bin/sh\n"
        "for image in /run/godwit/store/*/target/writer/images/core-*.img; do\n"
        '  [ -e "$image" ] && echo bad > "$image"\n'
        "done\n"
        f'exec {CRIU}.real "$@"\n'
        f"EOF\nchmod 755 {CRIU}"
    )
    with scene.cluster.counter(address) as client:
        scene.cluster.node_exec(target, "sh", "-c", sabotage)
        try:
            status = scene.migrate(pod, target)
        finally:
            scene.cluster.node_exec(target, "sh", "-c", f"mv {CRIU}.real {CRIU}")
        assert status["phase"] == "Aborted", status
        scene.ready_pod("redis")
        assert scene.pod(pod)["spec"]["nodeName"] == source
        numbers = _lines(scene, pod, "numbers")
        assert numbers == [str(i + 1) for i in range(len(numbers))]
        scene.assert_no_debris(pod_lives=True)
        scene.must_succeed(pod, target)
        report = client.stop()
    assert report["ok"], report
