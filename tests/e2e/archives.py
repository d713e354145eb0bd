"""Checkpoints and restores as a test asks for them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from e2e.support import Scene
from lab.cluster import SYSTEM_NAMESPACE, Cluster

KEY = "godwit-e2e-key"
KEYS: dict[str, bytes] = {}
DIRECTORY = "/var/lib/godwit/checkpoints"


@contextlib.contextmanager
def key(cluster: Cluster, name: str, data: bytes) -> Iterator[None]:
    """The Secret of this name for as long as the block runs; its data stays in KEYS."""
    KEYS[name] = data
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": SYSTEM_NAMESPACE},
            "type": "godwit.io/checkpoint-key",
            "data": {"key": base64.b64encode(data).decode()},
        }
    )
    try:
        yield
    finally:
        cluster.kubectl("delete", "secret", name, "-n", SYSTEM_NAMESPACE)


def archives(scene: Scene) -> Iterator[Scene]:
    """A fixture: a key, and no archives afterwards."""
    with key(scene.cluster, KEY, os.urandom(32)):
        yield scene
    for node in scene.nodes:
        scene.cluster.node_exec(node, "rm", "-rf", f"{DIRECTORY}/{scene.namespace}")


def ask(scene: Scene, kind: str, name: str, **spec: Any) -> dict[str, Any]:
    """Make the object, await its end, and return its status."""
    scene.cluster.apply(
        {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": scene.namespace},
            "spec": {"keySecretName": KEY, **spec},
        }
    )
    end = time.monotonic() + 240
    while True:
        status = scene.cluster.get(kind.lower(), name, scene.namespace).get("status", {})
        if status.get("phase") in ("Succeeded", "Rejected", "Failed"):
            return dict(status)
        assert time.monotonic() < end, status
        time.sleep(0.5)


def done(status: dict[str, Any]) -> dict[str, Any]:
    """The status, which must be good."""
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    return status


def carry(scene: Scene, name: str, source: str, target: str) -> None:
    """What an administrator without a shared file system does."""
    path = f"{DIRECTORY}/{scene.namespace}/{name}.godwit"
    script = f"mkdir -p {DIRECTORY}/{scene.namespace} && cat > {path}"
    reading = scene.cluster.argv("node", "exec", source, "--", "cat", path)
    with subprocess.Popen(reading, stdout=subprocess.PIPE) as reader:
        writing = scene.cluster.argv("node", "exec", target, "--", "sh", "-c", script)
        subprocess.run(writing, stdin=reader.stdout, check=True)
    assert reader.returncode == 0
