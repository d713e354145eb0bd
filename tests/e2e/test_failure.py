"""What goes wrong before the commit leaves the pod serving on the same connection."""

from __future__ import annotations

import pytest

from e2e.support import Scene

pytestmark = pytest.mark.bridged

_CRIU = "/opt/godwit/criu/criu"


@pytest.mark.parametrize("phase", ["Pending", "Checking", "Copying", "HandingOver", "Switching"])
def test_cancel(scene: Scene, phase: str) -> None:
    """Deleting the object cancels it, in whatever phase before the commit."""
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    limit: dict[str, int] = {}
    if phase == "Copying":  # long enough to be seen
        scene.cluster.fill(address, 100)
        limit = {"bandwidthLimit": 50_000_000}
    with scene.cluster.counter(address) as client:
        name = scene.apply_migration(pod, scene.nodes[1], **limit)
        if phase not in ("Pending", "Checking"):
            scene.until_phase(name, phase)
        scene.cluster.kubectl(
            "delete", "pmig", name, "-n", scene.namespace, "--wait", "--timeout=120s"
        )
        scene.cluster.wait_ready(pod, scene.namespace)
        seen = scene.pod(pod)
        # later the commit may come before the word: then it is too late
        if phase not in ("HandingOver", "Switching"):
            assert seen["spec"]["nodeName"] == scene.nodes[0]
        assert seen["status"]["podIP"] == address
        report = client.stop()
    assert report["ok"], report
    scene.assert_no_debris(pod_lives=True)


@pytest.mark.parametrize("kind", ["statefulset", "deployment", "pod"])
def test_failing_restore(scene: Scene, kind: str) -> None:
    """A damaged image on the target: the pod ends up serving at home, nothing is left behind."""
    source, target = scene.nodes[:2]
    pod = scene.start(kind, "redis", source)
    address = scene.pod(pod)["status"]["podIP"]
    sabotage = (
        f"mv {_CRIU} {_CRIU}.real; cat > {_CRIU} <<'EOF'\n"
        "#!/bin/sh\n"
        'if [ -n "$CRIU_CONFIG_FILE" ]; then\n'
        "  find /run/godwit/store -name 'core-*.img' | while read -r f; do echo bad > $f; done\n"
        "fi\n"
        f'exec {_CRIU}.real "$@"\n'
        f"EOF\nchmod 755 {_CRIU}"
    )
    with scene.cluster.counter(address) as client:
        scene.cluster.node_exec(target, "sh", "-c", sabotage)
        try:
            status = scene.migrate(pod, target)
        finally:
            scene.cluster.node_exec(target, "sh", "-c", f"mv {_CRIU}.real {_CRIU}")
        assert status["phase"] == "Aborted", status
        pod = scene.ready_pod("redis")
        seen = scene.pod(pod)
        assert seen["spec"]["nodeName"] == source
        assert seen["status"]["podIP"] == address
        scene.assert_no_debris(pod_lives=True)
        scene.must_succeed(pod, target)
        report = client.stop()
    assert report["ok"], report


def test_pod_deleted_in_mid_migration(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    scene.cluster.fill(scene.pod(pod)["status"]["podIP"], 100)
    name = scene.apply_migration(pod, scene.nodes[1], bandwidthLimit=30_000_000)
    scene.until_phase(name, "Copying")
    scene.cluster.kubectl("delete", "pod", pod, "-n", scene.namespace, "--wait")
    status = scene.final(name)
    assert status["phase"] == "Aborted"
    assert status["reason"] in {"SourceDeleted", "PodReplaced", "SourceExited", "PodNotFound"}
    scene.ready_pod("redis")
    scene.assert_no_debris(pod_lives=True)


@pytest.mark.parametrize("service", ["kubelet", "containerd"])
def test_restart_on_the_source_while_the_guard_holds(scene: Scene, service: str) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        name = scene.apply_migration(pod, scene.nodes[1])
        scene.until_phase(name, "HandingOver")
        scene.cluster.node_exec(scene.nodes[0], "systemctl", "restart", service)
        assert scene.final(name)["phase"] in {"Succeeded", "Aborted"}
        scene.ready_pod("redis")
        report = client.stop()
    assert report["ok"], report
