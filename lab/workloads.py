"""Manifests of the workloads that are moved; plain dictionaries for ``kubectl apply``."""

from __future__ import annotations

from typing import Any

from lab.cluster import LAB_IMAGE

RUNTIME_CLASS = "godwit"
Manifest = dict[str, Any]


def preferring(node: str | None) -> Manifest:
    """Affinity of a pod that starts on ``node`` and may go elsewhere."""
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    wish = {"weight": 100, "preference": term}
    wishes = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}
    return {"affinity": wishes} if node else {}


def pod(
    name: str,
    namespace: str,
    image: str,
    *,
    node: str | None = None,
    port: int | None = None,
    volumes: dict[str, Manifest] | None = None,
    **container: Any,
) -> Manifest:
    """A bare pod of one container; Ready when ``port`` is open. ``volumes``: path to source."""
    named = {path: f"v{number}" for number, path in enumerate(volumes or {})}
    main = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "volumeMounts": [{"name": named[path], "mountPath": path} for path in named],
        **container,
    }
    if port:
        main["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _meta(name, namespace),
        "spec": {
            "runtimeClassName": RUNTIME_CLASS,
            "terminationGracePeriodSeconds": 2,
            "automountServiceAccountToken": False,
            "containers": [main],
            "volumes": [{"name": named[path], **(volumes or {})[path]} for path in named],
            **preferring(node),
        },
    }


def replicated(pod: Manifest) -> Manifest:
    """A StatefulSet that makes this pod."""
    labels = pod["metadata"]["labels"]
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": pod["metadata"],
        "spec": {
            "serviceName": pod["metadata"]["name"],
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod["spec"]},
        },
    }


def dirtier(
    name: str, namespace: str, image: str, megabytes: int, *, node: str, shared: bool = False
) -> Manifest:
    """A server that writes to its memory (``shared``: a memfd) and can check every page."""
    words = ["/lab/dirtier", "6379", str(megabytes), *(["shared"] if shared else [])]
    return pod(name, namespace, image, node=node, port=6379, command=words)


def redis_pod_spec(*, node: str | None = None, runtime_class: str = RUNTIME_CLASS) -> Manifest:
    """Pod spec of one Redis without persistence; DEBUG POPULATE is allowed to fill it."""
    spec: Manifest = {
        "runtimeClassName": runtime_class,
        "terminationGracePeriodSeconds": 5,
        "automountServiceAccountToken": False,
        **preferring(node),
        "containers": [
            {
                "name": "redis",
                "image": LAB_IMAGE,
                "imagePullPolicy": "IfNotPresent",
                "workingDir": "/tmp",
                "command": [
                    "redis-server",
                    *("--bind", "0.0.0.0", "--protected-mode", "no"),
                    *("--save", "", "--enable-debug-command", "yes"),
                ],
                "ports": [{"containerPort": 6379, "name": "redis"}],
                "readinessProbe": {"tcpSocket": {"port": 6379}, "periodSeconds": 1},
                # Without it any pod that has one goes first when processors are short.
                "resources": {"requests": {"cpu": "100m"}},
            }
        ],
    }
    return spec


def _meta(name: str, namespace: str) -> Manifest:
    return {"name": name, "namespace": namespace, "labels": {"app": name}}


def service(name: str, namespace: str) -> Manifest:
    """ClusterIP Service for the pods labelled ``app: name``."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(name, namespace),
        "spec": {"selector": {"app": name}, "ports": [{"port": 6379, "name": "redis"}]},
    }


def stateful_set(name: str, namespace: str, *, node: str | None = None) -> Manifest:
    """StatefulSet of one Redis."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _meta(name, namespace),
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": redis_pod_spec(node=node)},
        },
    }


def deployment(name: str, namespace: str, *, node: str | None = None) -> Manifest:
    """Deployment of one Redis."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _meta(name, namespace),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": redis_pod_spec(node=node)},
        },
    }


def bare_pod(name: str, namespace: str, *, node: str | None = None) -> Manifest:
    """A Redis pod without an owner."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _meta(name, namespace),
        "spec": redis_pod_spec(node=node),
    }


def migration(name: str, namespace: str, pod: str, target: str, **spec: Any) -> Manifest:
    """A PodMigration of ``pod`` to the node ``target``."""
    return {
        "apiVersion": "godwit.io/v1alpha1",
        "kind": "PodMigration",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podName": pod, "target": {"nodeName": target}, **spec},
    }
