"""When copying ends, over made-up loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit_agent.memory import rounds
from godwit_agent.memory.rounds import FIXED_FREEZE_MS, MAX_ROUNDS, Decision, Round, Verdict

MB = 1_000_000
BANDWIDTH = 100 * MB

SIZES = st.integers(0, 64 << 30)
LATER = st.builds(
    Round, SIZES, SIZES, st.floats(1e-6, 1e5), st.floats(1e-6, 1e5), st.integers(0, 10**11)
)
FIRST = st.builds(Round, SIZES, SIZES, st.floats(1e-6, 1e5), st.just(0.0), st.integers(0, 10**11))
HISTORIES = st.builds(
    lambda first, later: [first, *later], FIRST, st.lists(LATER, max_size=MAX_ROUNDS - 1)
)
BUDGETS = st.one_of(st.just(0), st.integers(1, 60_000))


def first(size: int) -> Round:
    return Round(size, size, size / BANDWIDTH, 0.0, BANDWIDTH)


def drive(size: int, rate: int, budget_ms: int = 0) -> tuple[list[Round], Decision]:
    """A program of ``size`` bytes that writes ``rate`` bytes/s, no page twice."""
    done: list[Round] = []
    while (decision := rounds.decide(done, budget_ms=budget_ms)).verdict is Verdict.AGAIN:
        if done:
            since = done[-1].seconds
            dirty = min(size, round(rate * since))
            done.append(Round(dirty, dirty, dirty / BANDWIDTH + 1e-3, since, BANDWIDTH))
        else:
            done.append(first(size))
    return done, decision


@settings(deadline=None)
@given(HISTORIES, BUDGETS)
def test_a_budget_is_kept_or_refused(done: list[Round], budget_ms: int) -> None:
    decision = rounds.decide(done, budget_ms=budget_ms)
    assert decision.predicted_freeze_ms >= FIXED_FREEZE_MS
    if budget_ms and decision.verdict is Verdict.SWITCH:
        assert decision.predicted_freeze_ms <= budget_ms
    if decision.verdict is Verdict.REFUSE:
        assert budget_ms
        assert max(decision.predicted_freeze_ms, FIXED_FREEZE_MS) > budget_ms


@settings(deadline=None)
@given(st.integers(4096, 64 << 30), st.integers(0, 10**10), BUDGETS)
def test_every_load_comes_to_an_end(size: int, rate: int, budget_ms: int) -> None:
    done, decision = drive(size, rate, budget_ms)
    assert len(done) <= MAX_ROUNDS
    assert decision.verdict is not Verdict.AGAIN


@settings(deadline=None)
@given(st.integers(64 << 20, 64 << 30), st.integers(0, BANDWIDTH // 2))
def test_a_load_of_half_the_link_converges_whatever_the_size(size: int, rate: int) -> None:
    done, decision = drive(size, rate, budget_ms=300)
    if len(done) < MAX_ROUNDS:
        assert decision.verdict is Verdict.SWITCH


@settings(deadline=None)
@given(st.integers(1 << 30, 64 << 30), st.integers(2 * BANDWIDTH, 10**10))
def test_a_load_beyond_the_link_is_refused_within_a_few_rounds(size: int, rate: int) -> None:
    done, decision = drive(size, rate, budget_ms=500)
    assert decision.verdict is Verdict.REFUSE
    assert len(done) < MAX_ROUNDS


@settings(deadline=None)
@given(HISTORIES)
def test_the_first_round_never_ends_the_copy(done: list[Round]) -> None:
    assert rounds.decide(done[:1]).verdict is Verdict.AGAIN


@settings(deadline=None)
@given(LATER)
def test_no_less_is_left_than_was_found_in_the_same_time(one: Round) -> None:
    assert one.left_bytes >= one.dirty_bytes
    if one.seconds <= one.since_s:
        assert one.left_bytes == one.dirty_bytes


def test_a_round_that_lasts_longer_than_the_one_before_leaves_more() -> None:
    assert Round(10 * MB, 10 * MB, 3.0, 1.0, BANDWIDTH).left_bytes == 30 * MB


def test_a_budget_below_what_is_paid_anyway_is_refused_before_a_byte_is_sent() -> None:
    decision = rounds.decide([], budget_ms=FIXED_FREEZE_MS - 1)
    assert decision == Decision(Verdict.REFUSE, FIXED_FREEZE_MS)
    assert rounds.decide([], budget_ms=FIXED_FREEZE_MS).verdict is Verdict.AGAIN


@settings(deadline=None)
@given(HISTORIES, st.integers(0, 60_000), BUDGETS)
def test_what_any_freeze_pays_is_in_the_prediction_and_no_round_changes_it(
    done: list[Round], fixed_ms: int, budget_ms: int
) -> None:
    done[-1] = replace(done[-1], fixed_ms=fixed_ms)
    decision = rounds.decide(done, budget_ms=budget_ms, steps_left=2)
    assert decision.predicted_freeze_ms >= FIXED_FREEZE_MS + fixed_ms
    if budget_ms and FIXED_FREEZE_MS + fixed_ms > budget_ms:
        assert decision.verdict is not Verdict.SWITCH
    if len(done) > 1:
        always = [replace(one, fixed_ms=fixed_ms) for one in done]
        refused = rounds.decide(always, budget_ms=budget_ms, steps_left=2).verdict
        assert not 0 < budget_ms < FIXED_FREEZE_MS + fixed_ms or refused is Verdict.REFUSE


def test_memory_that_criu_carries_is_paid_for_at_its_rate_and_the_links() -> None:
    carried = rounds.CARRIED_BYTES_PER_S
    assert rounds.fixed_ms(5_000, 0, BANDWIDTH) == 5
    assert rounds.fixed_ms(0, carried, 0) == 1000
    assert rounds.fixed_ms(0, carried, carried) == 2000


@settings(deadline=None)
@given(HISTORIES, st.integers(1, 60_000), st.integers(1, 4))
def test_a_pod_is_slowed_down_exactly_where_its_budget_would_be_refused(
    done: list[Round], budget_ms: int, steps_left: int
) -> None:
    without = rounds.decide(done, budget_ms=budget_ms)
    with_steps = rounds.decide(done, budget_ms=budget_ms, steps_left=steps_left)
    if without.verdict is Verdict.REFUSE and budget_ms >= FIXED_FREEZE_MS:
        assert with_steps.verdict is Verdict.THROTTLE
    else:
        assert with_steps == without


@settings(deadline=None)
@given(HISTORIES, st.integers(FIXED_FREEZE_MS, 60_000))
def test_with_post_copy_a_switch_takes_the_place_of_a_refusal(
    done: list[Round], budget_ms: int
) -> None:
    without = rounds.decide(done, budget_ms=budget_ms)
    after = rounds.decide(done, budget_ms=budget_ms, post_copy=True)
    refused = without.verdict is Verdict.REFUSE
    assert after.verdict is (Verdict.SWITCH if refused else without.verdict)
    assert after.predicted_freeze_ms <= max(min(without.predicted_freeze_ms, budget_ms),
                                            FIXED_FREEZE_MS)  # fmt: skip


def test_the_freeze_of_a_post_copy_sends_what_costs_nothing_or_what_its_budget_allows() -> None:
    assert rounds.allowance(BANDWIDTH) == rounds.SMALL_BYTES
    assert rounds.allowance(BANDWIDTH, FIXED_FREEZE_MS + 50) == BANDWIDTH // 20
    same = Round(60 * MB, 60 * MB, 0.6, 0.6, BANDWIDTH)
    decision = rounds.decide([first(1000 * MB), same, same], post_copy=True)
    expected = rounds.predicted_freeze_ms(rounds.SMALL_BYTES, BANDWIDTH)
    assert decision == Decision(Verdict.SWITCH, expected)


def test_a_post_copy_does_not_send_twice_what_is_written_in_every_round() -> None:
    everything = Round(990 * MB, 990 * MB, 9.9, 10.0, BANDWIDTH)
    done = [first(1000 * MB), everything]
    assert rounds.decide(done).verdict is Verdict.AGAIN
    assert rounds.decide(done, post_copy=True).verdict is Verdict.SWITCH
    # a budget has patience, and shared memory cannot be left for later
    assert rounds.decide(done, budget_ms=200, post_copy=True).verdict is Verdict.AGAIN
    bound = replace(everything, bound_bytes=900 * MB)
    assert rounds.decide([done[0], bound], post_copy=True).verdict is Verdict.AGAIN
    half = replace(everything, dirty_bytes=500 * MB)
    assert rounds.decide([done[0], half], post_copy=True).verdict is Verdict.AGAIN


def test_a_post_copy_does_not_help_where_the_freeze_itself_takes_too_long() -> None:
    # comparing shared memory takes longer by now than the budget has room for
    calm = Round(60 * MB, 60 * MB, 0.6, 0.6, BANDWIDTH, fixed_ms=20)
    slow = replace(calm, fixed_ms=120)
    done = [first(1000 * MB), calm, slow, slow, slow]
    assert rounds.allowance(BANDWIDTH, 200, FIXED_FREEZE_MS + 120) == 0
    decision = rounds.decide(done, budget_ms=200, post_copy=True)
    assert decision == Decision(Verdict.REFUSE, FIXED_FREEZE_MS + 120)
    decision = rounds.decide([*done, calm], budget_ms=200, post_copy=True)
    assert decision == Decision(Verdict.SWITCH, 200)


def test_what_no_post_copy_withholds_is_part_of_its_freeze() -> None:
    same = Round(60 * MB, 60 * MB, 0.6, 0.6, BANDWIDTH, bound_bytes=30 * MB)
    done = [first(1000 * MB), same, same, same, same]
    room = FIXED_FREEZE_MS + 400
    assert rounds.allowance(BANDWIDTH, room, FIXED_FREEZE_MS, 30 * MB) == 10 * MB
    assert rounds.decide(done, budget_ms=room, post_copy=True) == Decision(Verdict.SWITCH, room)
    decision = rounds.decide(done, budget_ms=FIXED_FREEZE_MS + 200, post_copy=True)
    assert decision == Decision(Verdict.REFUSE, FIXED_FREEZE_MS + 300)
    assert rounds.decide(done, post_copy=True) == Decision(Verdict.SWITCH, FIXED_FREEZE_MS + 300)


def test_it_grows_with_the_round_as_all_that_is_left_does() -> None:
    slow = Round(60 * MB, 60 * MB, 1.2, 0.6, BANDWIDTH, bound_bytes=30 * MB)
    assert (slow.left_bytes, slow.bound_left_bytes) == (120 * MB, 60 * MB)
    assert replace(slow, since_s=0.0).bound_left_bytes == 0


def test_after_a_step_the_copy_has_its_patience_again() -> None:
    same = Round(60 * MB, 60 * MB, 0.6, 0.6, BANDWIDTH)
    assert rounds.decide([same], budget_ms=200, steps_left=3).verdict is Verdict.AGAIN


def test_one_burst_of_writes_is_not_held_against_a_budget() -> None:
    calm = Round(60 * MB, 60 * MB, 0.6, 1.0, BANDWIDTH)
    burst = Round(200 * MB, 200 * MB, 2.0, 2.0, BANDWIDTH)
    done = [first(1000 * MB), calm, burst]
    assert rounds.decide(done, budget_ms=200).verdict is Verdict.AGAIN
    assert rounds.decide([*done, burst, burst], budget_ms=200).verdict is Verdict.REFUSE


def test_without_a_budget_the_copy_ends_where_rounds_no_longer_help() -> None:
    same = Round(60 * MB, 60 * MB, 0.6, 0.6, BANDWIDTH)
    assert rounds.decide([first(1000 * MB), same]).verdict is Verdict.AGAIN
    assert rounds.decide([first(1000 * MB), same, same]).verdict is Verdict.SWITCH


@pytest.mark.parametrize(
    ("left", "bandwidth", "expected"), [(0, 0, 0), (100 * MB, 1000 * MB, 100), (MB, 0, 0)]
)
def test_the_prediction_grows_with_what_is_left(left: int, bandwidth: int, expected: int) -> None:
    assert rounds.predicted_freeze_ms(left, bandwidth) == FIXED_FREEZE_MS + expected
