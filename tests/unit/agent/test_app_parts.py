"""Small parts of the application, each by itself."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.host import FakeNode, World, pod_state
from godwit_agent.app import fitness
from godwit_agent.app.guarding import Guards
from godwit_agent.app.housekeeping import Housekeeping
from godwit_agent.app.journal import JournalStore, Key, Role, Step
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import Migration
from godwit_agent.app.rollback import roll_back
from godwit_agent.app.sessions import Busy
from godwit_agent.app.switch import Watchdog
from godwit_agent.hostops.model import Guard, Obstacle
from godwit_agent.server.edge import LongCalls
from godwit_api.errors import Aborted, Retryable, Unsafe
from godwit_api.reasons import Reason

UID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "11234567-89ab-cdef-0123-456789abcdef"
MIGRATION = Migration(UID, 1, "ns", "m")


@pytest.fixture
def node() -> FakeNode:
    return FakeNode(World(), "a")


def leaving(node: FakeNode) -> Leaving:
    return Leaving(node.host(), UID, pod_state(OTHER), ("10.244.1.7",), "192.0.2.1")


def test_a_decision_and_the_watchdog_exclude_each_other() -> None:
    stopped = threading.Event()
    with Watchdog(0.05, stopped.set) as watchdog:
        assert stopped.wait(5)
        with pytest.raises(Aborted) as caught:
            watchdog.decide(lambda: pytest.fail("committed too late"))
        assert caught.value.reason is Reason.FREEZE_TIMEOUT
    stopped.clear()
    with Watchdog(0.05, stopped.set) as watchdog:
        watchdog.decide(lambda: time.sleep(0.1))
        time.sleep(0.05)
        assert not stopped.is_set()
        assert not watchdog.fired


@pytest.mark.parametrize("broken", ["reject", "thaw", "lift"])
def test_a_rollback_tries_every_step_and_says_what_failed(node: FakeNode, broken: str) -> None:
    source = leaving(node)
    source.prepare()
    node.world.fail[f"a.{broken}"] = OSError("no")
    with pytest.raises(Unsafe):
        roll_back(MIGRATION, source)
    for step in ("a.reject", "a.thaw", "a.lift", "a.close_network"):
        assert step in node.world.effects
    node.world.fail.clear()
    roll_back(MIGRATION, source)
    source.close()


def test_a_source_found_frozen_is_rolled_back_without_what_was_prepared(node: FakeNode) -> None:
    source = leaving(node)
    roll_back(MIGRATION, source)
    assert node.world.effects == ["a.recover_dump", "a.thaw", "a.reset_network"]
    source.close()


def test_an_address_is_held_only_at_home() -> None:
    for name, held in (("a", True), ("b", False)):
        node = FakeNode(World(), name)
        source = leaving(node)
        source.hold_address()
        assert bool(node.held_here) is held
        source.close()


def test_one_operation_at_a_time() -> None:
    busy = Busy()
    with busy("Copy"), pytest.raises(Retryable, match="Copy is still under way"), busy("Switch"):
        pass
    with busy("Switch"):
        pass


def test_long_calls_leave_threads_for_the_other_agent() -> None:
    calls = LongCalls(1)
    with calls.enter(), pytest.raises(Retryable), calls.enter():
        pass
    with calls.enter():
        pass


def test_guards_of_living_migrations_are_renewed(node: FakeNode, tmp_path: Path) -> None:
    journals = JournalStore(tmp_path)
    journals.open(Key(UID, 1, Role.SOURCE)).append(Step.GUARDED)
    node.guard_files = {"x": Guard("x", UID, 1, 5), "y": Guard("y", OTHER, 1, 5)}
    Guards(node.host(), journals, 600).renew()
    assert node.guard_files["x"].deadline_boot > time.clock_gettime(time.CLOCK_BOOTTIME) + 500
    assert node.guard_files["y"].deadline_boot == 5


def test_debris_goes_and_what_lives_stays(node: FakeNode, tmp_path: Path) -> None:
    journals = JournalStore(tmp_path)
    journals.open(Key(UID, 1, Role.TARGET)).append(Step.EXPECTED)
    journals.open(Key(OTHER, 1, Role.SOURCE)).append(Step.ABORTED)
    host = node.host()
    for uid in (UID, OTHER):
        host.stores.create_target(uid, ("app",), 1)
        host.hooks.expect("pod-" + uid, uid, 1, "ip", {})
        host.hooks.guard(["cid-" + uid], uid, 1, 99)
    house = Housekeeping(host, journals, 72)
    house.sweep()
    assert set(node.stores_here) == {UID}
    assert set(node.expected_pods) == {"pod-" + UID}
    assert set(node.guard_files) == {"cid-" + UID}
    house.forget_old()
    assert len(journals.attempts()) == 2
    Housekeeping(host, journals, 0).forget_old()
    assert [key.uid for key in journals.attempts()] == [UID]


def test_a_successor_that_never_ran_is_known_until_the_kubelet_has_taken_it_down(
    node: FakeNode, tmp_path: Path
) -> None:
    """The kubelet may not know yet that the pod was deleted, and start its containers again."""
    host, house = node.host(), Housekeeping(node.host(), JournalStore(tmp_path), 72)
    host.hooks.expect("successor", UID, 1, ("ip",), {})
    host.hooks.unexpect("successor", ran=False)
    node.successor_arrives("successor")
    for age_s, gone in ((10.0, False), (1e6, False), (10.0, True)):
        node.marks_age_s = age_s
        if gone:
            del node.pods_here["successor"]
        house.sweep()
        assert set(node.marked_pods) == {"successor"}
    node.marks_age_s = 1e6
    house.sweep()
    assert not node.marked_pods


def test_a_node_that_is_alike_has_no_obstacles(node: FakeNode) -> None:
    facts = node.host().probe.facts()
    assert list(fitness.obstacles("a", facts, facts)) == []


def test_a_node_without_the_security_module_cannot_take_a_process(node: FakeNode) -> None:
    here = node.host().probe.facts()
    there = replace(here, versions={**here.versions, "security module": "apparmor"})
    (found,) = fitness.obstacles("a", there, here)
    assert found == Obstacle(
        Reason.VERSION_DIFFERS, "security module is apparmor on a, absent here"
    )
    assert list(fitness.obstacles("a", there, there)) == []
