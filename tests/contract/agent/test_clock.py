"""Somebody sets the machine's clock while a pod moves: nothing is decided by it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fakes.cluster import Cluster
from fakes.cluster import cluster as make_cluster

DAY_S = 86_400


class Clock:
    """The module ``time`` as the agent's own modules see it after the clock was set. gRPC keeps
    the real one: its core and the kernel would have followed the step together."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.offset_s = 0
        seen = SimpleNamespace(**vars(time))
        seen.time = lambda: time.time() + self.offset_s
        seen.time_ns = lambda: time.time_ns() + self.offset_s * 10**9
        for name, module in list(sys.modules.items()):
            if name.startswith("godwit_agent.") and getattr(module, "time", None) is time:
                patch.setattr(module, "time", seen)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from make_cluster(tmp_path)


def set_at(cluster: Cluster, effect: str, clock: Clock, step_s: int) -> None:
    def act() -> None:
        clock.offset_s += step_s
        del cluster.world.fail[effect]

    cluster.world.fail[effect] = act


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S])
@pytest.mark.parametrize(
    "effect", ["a.freeze", "a.dump", "b.restore", "a.route_via", "b.resume", "a.kill"]
)
def test_a_pod_moves_while_the_clock_is_set(
    cluster: Cluster, clock: Clock, effect: str, step_s: int
) -> None:
    cluster.ready()
    deadlines = {name: guard.deadline_boot for name, guard in cluster.a.fake.guard_files.items()}
    assert deadlines
    set_at(cluster, effect, clock, step_s)
    got = cluster.switch()
    assert got.committed
    assert 0 < got.freeze_us < 60_000_000
    assert cluster.b.fake.running
    assert clock.offset_s == step_s
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert all(boot < deadline < boot + 3600 for deadline in deadlines.values())
    cluster.finish()
    assert cluster.a.steps() == ["Finished"]


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S])
def test_a_rollback_is_one_whatever_the_clock_says(
    cluster: Cluster, clock: Clock, step_s: int
) -> None:
    cluster.ready()
    set_at(cluster, "a.dump", clock, step_s)
    cluster.world.fail["b.restore"] = OSError("no restore")
    got = cluster.switch()
    assert not got.committed
    assert 0 < got.freeze_us < 60_000_000
    assert not cluster.a.fake.frozen_ids
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()
