"""What a migration says about itself before it freezes anything."""

from __future__ import annotations

import pytest

from e2e.support import Scene

pytestmark = pytest.mark.bridged


def test_dry_run_tells_and_touches_nothing(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    before = scene.pod(pod)
    address = before["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        status = scene.migrate(pod, scene.nodes[1], dryRun=True)
        report = client.stop()
    assert report["ok"], report
    assert status["phase"] == "Succeeded", status
    assert status["predictedFreezeMilliseconds"] > 0
    assert status["predictedTotalSeconds"] > 0
    assert status["transferredBytes"] > 0
    assert "freezeMilliseconds" not in status
    after = scene.pod(pod)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["nodeName"] == scene.nodes[0]
    scene.assert_no_debris(pod_lives=True)
    scene.must_succeed(pod, scene.nodes[1])


def test_budget_that_cannot_be_met_is_refused_before_the_freeze(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    before = scene.pod(pod)
    status = scene.migrate(pod, scene.nodes[1], freezeBudgetMilliseconds=1)
    assert status["phase"] == "Aborted", status
    assert "FreezeBudgetExceeded" in str(status), status
    assert "predicted" in status["message"]
    after = scene.pod(pod)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["nodeName"] == scene.nodes[0]
