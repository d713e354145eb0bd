"""The operator's process is killed at every step of one move, each time at the same boundary.

``decided``: before the intent is written; ``announced``: with the intent written
and the effect not begun; ``done``: with the effect there and its result lost.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from contract.operator.apiserver import ApiServer
from contract.operator.test_moves import Scene, nodes_of_the_volume, on_a_local_volume, scene
from contract.operator.test_process import Process, _apply, may_change_volumes, process
from godwit_operator.kube import MIGRATIONS, find
from godwit_operator.steps import AFTER_COMMIT, Step

__all__ = ["process", "scene"]  # the fixtures
pytestmark = pytest.mark.host

TO_THE_COMMIT = [
    Step.CHECK,
    Step.PREPARE_TARGET,
    Step.COPY,
    Step.BRIDGE,
    Step.GUARD,
    Step.ARM_RULE,
    Step.DELETE_POD,
    Step.FIND_SUCCESSOR,
    Step.EXPECT_POD,
    Step.RELEASE_SUCCESSOR,
    Step.AWAIT_GATE,
    Step.SWITCH,
]
PATIENCE_S = 240.0


@pytest.mark.parametrize("boundary", ["decided", "announced", "done"])
async def test_an_operator_killed_at_every_step_ends_its_move(
    scene: Scene,
    process: Process,
    apiserver: ApiServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    boundary: str,
) -> None:
    directory = tmp_path / "failpoints"
    directory.mkdir(mode=0o700)
    names = [f"operator.{step}.{boundary}" for step in [*TO_THE_COMMIT, *AFTER_COMMIT]]
    for name in names:
        (directory / name).write_text("crash")
    may_change_volumes(apiserver)
    await on_a_local_volume(scene, "StatefulSet", "n2")
    target = "n3"
    process.stop()
    monkeypatch.setenv("GODWIT_FAILPOINTS", str(directory))
    process.start()
    scene.world.missing = [4096, 4096]  # so that it has every step there is
    await _apply(scene, "redis-0", target, convergence="PostCopy", copyVolumes=["data"])

    kills, phase = 0, ""
    end = time.monotonic() + PATIENCE_S
    while phase not in {"Succeeded", "Aborted", "Rejected", "Stalled"}:
        assert time.monotonic() < end, (phase, sorted(p.name for p in directory.iterdir()))
        code = process.ended()
        if code is not None:
            assert code == -signal.SIGKILL
            kills += 1
            process.start()
        found = await find(scene.api, MIGRATIONS, scene.namespace, "m") or {}
        phase = found.get("status", {}).get("phase", "")
        if found.get("status", {}).get("step") == Step.AWAIT_PAGES and scene.world.missing:
            scene.world.missing = [0]  # once they are all there they stay so
        await asyncio.sleep(0.05)

    assert phase == "Succeeded", found["status"]
    reached = {path.name for path in directory.glob("*.hit")}
    assert reached == {f"{name}.hit" for name in names}
    assert kills == len(names)
    assert scene.world.running_on == target
    assert await nodes_of_the_volume(scene) == [target]
    assert not scene.world.empty_starts
    switched = [epoch for _, call, epoch in scene.world.calls if call == "switch"]
    assert set(switched) == {1}
    await scene.nothing_left(found["metadata"]["uid"])
