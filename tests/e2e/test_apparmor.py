"""Where nodes have AppArmor, the runtime puts every container under its default profile."""

from __future__ import annotations

import pytest

import apparmor
from e2e.moving import exec_in
from e2e.support import Scene
from lab import workloads

pytestmark = pytest.mark.skipif(apparmor.missing() is not None, reason=str(apparmor.missing()))


def test_the_profile_follows(scene: Scene) -> None:
    """There and back, with a client that counts."""
    manifest = workloads.stateful_set("redis", scene.namespace, node=scene.nodes[0])
    scene.cluster.apply(workloads.service("redis", scene.namespace), manifest)
    scene.cluster.wait_ready("redis-0", scene.namespace)
    label = exec_in(scene, "redis-0", "cat", "/proc/1/attr/current").strip()
    assert label.endswith(" (enforce)")
    with scene.cluster.counter(scene.pod("redis-0")["status"]["podIP"]) as client:
        for node in (scene.nodes[1], scene.nodes[0]):
            scene.must_succeed("redis-0", node)
            assert exec_in(scene, "redis-0", "cat", "/proc/1/attr/current").strip() == label
        seen = client.stop()
    assert seen["ok"], seen
