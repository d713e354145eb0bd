"""The planner alone, and against a model of the world that loses messages and crashes."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from godwit_api.migration import Failure, Metadata, Phase, PodMigration, Spec, Status
from godwit_api.reasons import Reason
from godwit_operator.plan import (
    MAX_RETURNS,
    Again,
    Committed,
    Decision,
    Done,
    Failed,
    InvariantError,
    Observation,
    Result,
    Source,
    check,
    plan,
)
from godwit_operator.status import Learned, apply, encode, enter, merge_patch, observation
from godwit_operator.steps import AFTER_COMMIT, BACK, ENDS, ONWARD, Step, phase_of

FAILURE = Failure(reason=Reason.RESTORE_FAILED, message="no")
BROKEN = Failure(reason=Reason.AGENT_UNREACHABLE, message="away")


def after(step: Step, result: Result | None = None, **facts: object) -> Decision:
    return plan(Observation(step=step, result=result or Done(), **facts))  # type: ignore[arg-type]


def test_the_way_of_a_stateful_pod() -> None:
    way = [Step.QUEUE]
    facts: dict[str, Any] = {}
    changes: dict[Step, dict[str, Any]] = {
        Step.PREPARE_TARGET: {"attempt_open": True, "epoch": 1},
        Step.ARM_RULE: {"guarded": True, "rule_proven": True},
        Step.DELETE_POD: {"delete_intended": True, "source": Source.GONE},
        Step.EXPECT_POD: {"expected": True},
        Step.AWAIT_GATE: {"released": True},
    }
    while way[-1] is not Step.SWITCH:
        way.append(after(way[-1], **facts).step)
        facts |= changes.get(way[-1], {})
    assert [str(step) for step in way] == [
        "Queue",
        "Check",
        "PrepareTarget",
        "Copy",
        "Bridge",
        "Guard",
        "ArmRule",
        "DeletePod",
        "FindSuccessor",
        "ExpectPod",
        "ReleaseSuccessor",
        "AwaitGate",
        "Switch",
    ]


@pytest.mark.parametrize("step", [Step.QUEUE, Step.CHECK])
def test_nothing_was_touched_in_checking(step: Step) -> None:
    assert after(step, Failed(FAILURE)).step is Step.REJECTED
    assert plan(Observation(step=step, cancel=True)).step is Step.ABORTED


def test_a_dry_run_ends_after_the_copy() -> None:
    way = [Step.COPY]
    while way[-1] not in ENDS:
        way.append(after(way[-1], dry_run=True, attempt_open=True).step)
    assert way == [Step.COPY, *BACK, Step.SUCCEEDED]


def test_a_dry_run_that_failed_has_not_succeeded() -> None:
    assert after(BACK[-1], dry_run=True, failure=FAILURE).step is Step.ABORTED


@pytest.mark.parametrize("step", [Step.BRIDGE, Step.GUARD, Step.DELETE_POD])
def test_a_dry_run_never_touches(step: Step) -> None:
    facts = {"guarded": True, "rule_proven": True, "attempt_open": True}
    with pytest.raises(InvariantError):
        check(Observation(step=Step.COPY, dry_run=True, **facts), Decision(step))  # type: ignore[arg-type]


def test_a_pod_deleted_by_somebody_else_gives_everything_back() -> None:
    decision = after(Step.COPY, source=Source.GONE, attempt_open=True)
    assert decision.step is Step.RELEASE_SOURCE
    assert decision.failure is not None
    assert decision.failure.reason == Reason.SOURCE_DELETED


def test_a_switch_is_asked_about_before_it_is_repeated() -> None:
    facts = {"delete_intended": True, "source": Source.GONE, "released": True, "attempt_open": True}
    assert plan(Observation(step=Step.SWITCH, **facts)).step is Step.RESOLVE_SWITCH  # type: ignore[arg-type]
    assert after(Step.SWITCH, Again(BROKEN), **facts).step is Step.RESOLVE_SWITCH
    assert after(Step.SWITCH, Failed(FAILURE), **facts).step is Step.ABORT_ATTEMPT
    assert after(Step.SWITCH, Committed(), **facts).step is Step.SYNC_ADDRESSES


def test_after_the_commit_of_a_post_copy_the_source_waits_for_the_last_page() -> None:
    facts = {"committed": True, "delete_intended": True, "source": Source.GONE}
    assert after(Step.SYNC_ADDRESSES, **facts).step is Step.FINISH_SOURCE
    assert after(Step.SYNC_ADDRESSES, missing=True, **facts).step is Step.AWAIT_PAGES
    waiting = after(Step.AWAIT_PAGES, Again(BROKEN), missing=True, overdue=True, **facts)
    assert waiting.step is Step.AWAIT_PAGES
    assert after(Step.AWAIT_PAGES, missing=True, **facts).step is Step.FINISH_SOURCE
    gone = Failed(Failure(reason=Reason.PAGES_LOST, message="x"))
    lost = after(Step.AWAIT_PAGES, gone, missing=True, **facts)
    assert (lost.step, lost.failure) == (Step.FINISH_SOURCE, gone.failure)
    assert after(Step.CLEAN_UP, lost=True, missing=True, **facts).step is Step.ABORTED


def test_a_moved_pod_that_does_not_become_ready_has_moved_and_is_told_of() -> None:
    facts = {"committed": True, "delete_intended": True, "source": Source.GONE}
    assert after(Step.AWAIT_READY, Again(BROKEN), **facts).step is Step.AWAIT_READY
    late = after(Step.AWAIT_READY, Again(BROKEN), overdue=True, **facts)
    assert late.step is Step.REMOVE_BRIDGE
    migration = PodMigration(metadata=Metadata(), spec=Spec(pod_name="p"))
    ends = []
    for decision in (late, after(Step.AWAIT_READY, **facts)):
        status = apply(Status(), Learned(note={"committed": True}))
        status = enter(migration, status, decision, 1e9)
        ends.append(enter(migration, status, Decision(Step.SUCCEEDED), 1e9))
    assert [status.phase for status in ends] == [Phase.SUCCEEDED] * 2
    assert ["not Ready 120 s later" in status.message for status in ends] == [True, False]


def test_unsafe_stops_everything() -> None:
    facts = {"delete_intended": True, "source": Source.GONE, "released": True, "attempt_open": True}
    assert after(Step.SWITCH, Failed(FAILURE, unsafe=True), **facts).step is Step.STALLED


def test_the_process_ended_while_its_pod_was_away() -> None:
    lost = Failed(Failure(reason=Reason.SOURCE_EXITED, message="exit 1"))
    facts = {"delete_intended": True, "source": Source.GONE, "attempt_open": True, "guarded": True}
    assert after(Step.AWAIT_GATE, lost, **facts).step is Step.LET_GO


def test_after_too_many_returns_a_person_is_asked() -> None:
    seen = Observation(
        step=Step.NEXT_TARGET,
        delete_intended=True,
        source=Source.GONE,
        returns=MAX_RETURNS,
        failure=FAILURE,
    )
    assert plan(seen).step is Step.STALLED


@pytest.mark.parametrize(
    ("step", "facts"),
    [
        (Step.DELETE_POD, {"rule_proven": True}),
        (Step.DELETE_POD, {"guarded": True}),
        (Step.RELEASE_SOURCE, {"delete_intended": True, "source": Source.GONE}),
        (Step.RELEASE_SOURCE, {"committed": True}),
        (Step.SWITCH, {"released": True}),
        (Step.NEXT_TARGET, {"attempt_open": True}),
        (Step.FINISH_SOURCE, {}),
        (Step.SUCCEEDED, {}),
        (Step.LET_GO, {}),
        (Step.REMOVE_BRIDGE, {"delete_intended": True, "source": Source.GONE}),
    ],
)
def test_harm_is_refused(step: Step, facts: dict[str, object]) -> None:
    with pytest.raises(InvariantError):
        check(Observation(step=Step.COPY, **facts), Decision(step))  # type: ignore[arg-type]


def test_every_step_has_its_phase() -> None:
    for step in Step:
        phase = phase_of(step, committed=step in AFTER_COMMIT)
        assert phase is not None or step in {*BACK, *ONWARD}


# -- a world that breaks -------------------------------------------------------------------


@dataclass
class World:
    """The truth that agents and API server hold."""

    pod: bool = True  # the source's Pod object
    guarded: bool = False
    rule: bool = False
    gated: bool = False  # a successor waits
    expected: bool = False
    released: bool = False
    runs_at: str = "source"
    committed: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)
    bridged: bool = False
    finished: bool = False
    missing: bool = False  # the copy needs pages that are on the source

    def assert_safe(self) -> None:
        if not self.pod and not self.committed and not self.finished:
            assert self.guarded, "the kubelet may kill the process"
            assert self.rule or self.gated or self.released, "an empty copy may start"
            assert self.bridged, "nobody can connect"


class Simulation:
    """Drives a migration like the driver, with fates for each effect."""

    def __init__(
        self, *, bare: bool, selector: bool, dry_run: bool = False, post_copy: bool = False
    ) -> None:
        self.world = World()
        self.post_copy = post_copy
        self.selector = selector
        self.now = time.time()
        status = Status(pod_uid="u", source_node="source", target_node="target")
        if not bare:
            note = msgspec.structs.replace(status.handover, owner_kind="StatefulSet")
            status = msgspec.structs.replace(status, handover=note)
        self.migration = PodMigration(
            metadata=Metadata(name="m", namespace="n", uid="m", generation=1),
            spec=Spec(pod_name="p-0", dry_run=dry_run),
            status=status,
        )
        self.result: Result | None = None
        self.learned = Learned()
        self.cancel = False
        self.ended_at = 0

    def turn(self, fate: str) -> None:
        dry_run = self.migration.spec.dry_run
        status = apply(self.migration.status, self.learned)
        source = Source.PRESENT if self.world.pod else Source.GONE
        seen = observation(
            self.migration, status, self.result, source=source, cancel=self.cancel, now=self.now
        )
        decision = plan(seen)
        if status.step == Step.STALLED and decision.step is not Step.STALLED:
            note = msgspec.structs.replace(status.handover, returns=0)
            status = msgspec.structs.replace(status, handover=note)
        if decision.step != status.step or decision.failure is not None:
            status = enter(self.migration, status, decision, self.now)
        self.persist(status)
        self.result, self.learned = None, Learned()
        if decision.step in ENDS:
            return
        if fate == "cancel":
            self.cancel = True
            fate = "good"
        if fate == "crash before":
            return
        if fate in {"away", "late"}:
            self.now += 1000 if fate == "late" else 1
            self.result = Again(BROKEN)
            return
        if fate == "broken" and self._may_break(decision.step):
            self.result = Failed(FAILURE)
            return
        if fate == "exited" and not self.world.committed and decision.step is Step.AWAIT_GATE:
            self.result = Failed(Failure(reason=Reason.SOURCE_EXITED, message="x"))
            self.world.finished = True
            return
        if fate == "pages lost" and decision.step is Step.AWAIT_PAGES and self.world.missing:
            self.result = Failed(Failure(reason=Reason.PAGES_LOST, message="x"))
            self.world.finished, self.world.missing = True, False
            return
        self.result, self.learned = self.effect(decision.step)
        self.world.assert_safe()
        assert not dry_run or self.world == World(), "a dry run touches nothing"
        if fate == "crash after":
            self.result, self.learned = None, Learned()
        if fate == "reply lost":
            self.result, self.learned = Again(BROKEN), Learned()

    def persist(self, status: Status) -> None:
        """Through JSON and a merge patch, as the API server would."""
        old, new = encode(self.migration.status), encode(status)
        patch = merge_patch(old, new)
        merged = _merge(old, patch)
        again = msgspec.convert(merged, Status)
        assert again == status
        self.migration = msgspec.structs.replace(self.migration, status=again)

    def _may_break(self, step: Step) -> bool:
        return step not in {*AFTER_COMMIT, *BACK, *ONWARD, Step.LET_GO, Step.RESOLVE_SWITCH}

    def effect(self, step: Step) -> tuple[Result, Learned]:
        world, status = self.world, self.migration.status
        epoch = status.epoch
        match step:
            case Step.CHECK:
                return Done(), Learned(status={"epoch": 1})
            case Step.BRIDGE:
                world.bridged = True
            case Step.GUARD:
                assert world.runs_at == "source"
                world.guarded = True
                return Done(), Learned(note={"guarded": True})
            case Step.ARM_RULE | Step.REARM_RULE:
                world.rule = True
                return Done(), Learned(note={"rule_proven": True})
            case Step.DELETE_POD:
                world.pod = False
            case Step.FIND_SUCCESSOR:
                world.gated = True
                return Done(), Learned(status={"successor_uid": f"s{epoch}"})
            case Step.EXPECT_POD:
                world.expected = True
                return Done(), Learned(note={"expected": True})
            case Step.RELEASE_SUCCESSOR:
                assert world.expected
                world.released = True
                return Done(), Learned(note={"released": True})
            case Step.SWITCH:
                assert epoch not in world.aborted, "an aborted attempt must not be switched"
                assert world.guarded
                world.committed.add(epoch)
                assert len(world.committed) == 1
                world.runs_at = status.target_node
                world.missing = self.post_copy
                learned = Learned(status={"post_copy_bytes": 1}) if self.post_copy else Learned()
                return Committed(), learned
            case Step.RESOLVE_SWITCH:
                learned = Learned(status={"post_copy_bytes": 1}) if world.missing else Learned()
                return (Committed() if epoch in world.committed else Done()), learned
            case Step.ABORT_ATTEMPT:
                if epoch in world.committed:
                    learned = Learned(status={"post_copy_bytes": 1}) if world.missing else Learned()
                    return Committed(), learned
                world.aborted.add(epoch)
                return Done(), Learned(note={"attempt_open": False})
            case Step.DELETE_SUCCESSOR:
                assert world.rule
                world.released = world.expected = world.gated = False
                cleared = Learned(status={"successor_uid": ""})
                return Done(), cleared.merged(Learned(note={"expected": False, "released": False}))
            case Step.NEXT_TARGET:
                home = not self.selector or self.cancel or epoch > 1
                node = "source" if home else "third"
                returns = status.handover.returns + int(home)
                return Done(), Learned(
                    status={"target_node": node, "epoch": epoch + 1}, note={"returns": returns}
                )
            case Step.RELEASE_SOURCE:
                assert not world.committed
                assert world.pod or world.finished
                world.guarded = False
                return Done(), Learned(note={"attempt_open": False, "guarded": False})
            case Step.LET_GO:
                world.rule = world.gated = world.released = False
            case Step.DISARM_RULE:
                world.rule = False
            case Step.AWAIT_PAGES:
                assert self.post_copy, "an ordinary move has no such step"
                world.missing = False
            case Step.FINISH_SOURCE:
                assert world.committed
                assert not world.missing, "the copy needs the source"
                world.guarded = False
            case Step.REMOVE_BRIDGE:
                assert world.committed or world.pod or world.finished
                world.bridged = False
            case _:
                pass
        return Done(), Learned()


def _merge(old: dict[str, object], patch: dict[str, object]) -> dict[str, object]:
    merged = dict(old)
    for key, value in patch.items():
        before = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merge(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


BAD = [
    "away",
    "late",
    "broken",
    "crash before",
    "crash after",
    "reply lost",
    "cancel",
    "exited",
    "pages lost",
]
FATES = st.sampled_from([*["good"] * 8, *BAD])


class Breaking(RuleBasedStateMachine):
    """Whatever breaks, the process is never lost nor doubled, and there is an end."""

    simulation: Simulation

    @initialize(
        bare=st.booleans(), selector=st.booleans(), dry_run=st.booleans(), post_copy=st.booleans()
    )
    def start(self, bare: bool, selector: bool, dry_run: bool, post_copy: bool) -> None:
        self.simulation = Simulation(
            bare=bare, selector=selector, dry_run=dry_run, post_copy=post_copy
        )

    @rule(fate=FATES)
    def turn(self, fate: str) -> None:
        self.simulation.turn(fate)

    @rule(count=st.integers(5, 20))
    def good_times(self, count: int) -> None:
        for _ in range(count):
            self.simulation.turn("good")

    @invariant()
    def safe(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.world.assert_safe()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            converge(self.simulation)


def converge(simulation: Simulation) -> None:
    """Let everything work from now on, and look at the end."""
    for _ in range(300):
        phase = simulation.migration.phase
        if phase.final and not (phase is Phase.STALLED and simulation.cancel):
            break
        simulation.turn("good")
    world, status = simulation.world, simulation.migration.status
    phase = simulation.migration.phase
    assert phase.final, status
    match phase:
        case Phase.SUCCEEDED if simulation.migration.spec.dry_run:
            assert world == World()
            assert status.reason == Reason.DRY_RUN
        case Phase.SUCCEEDED:
            assert world.committed
            assert world.runs_at == status.target_node != "source"
            assert not world.missing
            assert not world.finished
        case Phase.REJECTED:
            assert world == World()
        case Phase.ABORTED:
            assert world.runs_at == "source" or world.finished
            assert world.pod or world.committed or world.finished
        case _:
            assert world.runs_at == "source"  # stalled: guarded or its pod there
            assert world.pod or world.guarded or world.finished
    if phase is not Phase.STALLED:
        assert not world.rule
        assert not world.guarded
        assert not world.bridged


def test_what_a_lost_process_has_left_goes_when_its_stalled_migration_is_deleted() -> None:
    simulation = Simulation(bare=True, selector=False)
    while simulation.migration.status.step != Step.RELEASE_SUCCESSOR:
        simulation.turn("good")
    for fate in ("exited", "late", "good"):
        simulation.turn(fate)
    assert simulation.migration.phase is Phase.STALLED
    simulation.cancel = True
    converge(simulation)
    assert simulation.migration.phase is Phase.ABORTED


TestBreaking = Breaking.TestCase
TestBreaking.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_many_random_worlds(seed: int) -> None:
    """Sparser failures than hypothesis likes: they reach the later steps."""
    fates = [*["good"] * 8, *BAD]
    for number in range(500):
        chance = random.Random(f"{seed}-{number}")
        simulation = Simulation(bare=chance.random() < 0.5, selector=chance.random() < 0.5)
        density = chance.random()
        for _ in range(60):
            simulation.turn(chance.choice(fates) if chance.random() < density else "good")
        converge(simulation)
