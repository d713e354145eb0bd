"""What a node knows of its freezes before the next one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.memory.freezes import Freezes
from godwit_agent.memory.rounds import FIXED_FREEZE_MS

BANDWIDTH = 100_000_000


def learned(*freezes_ms: float, processes: int = 1, left: int = 0) -> Freezes:
    freezes = Freezes()
    for one in freezes_ms:
        freezes.learn(processes, one, left, BANDWIDTH)
    return freezes


def test_a_node_that_knows_nothing_says_what_was_measured_elsewhere() -> None:
    assert Freezes().base_ms(1) == Freezes().base_ms(0) == FIXED_FREEZE_MS
    assert learned(1000, 1000).base_ms(1) == FIXED_FREEZE_MS


def test_more_processes_take_longer() -> None:
    assert Freezes().base_ms(16) > 2 * Freezes().base_ms(1)


def test_a_slow_node_and_a_fast_one_say_so() -> None:
    slow, fast = learned(*[600] * 5), learned(*[100] * 5)
    assert slow.base_ms(1) == 600
    assert fast.base_ms(1) == 100
    assert slow.base_ms(4) > slow.base_ms(1)


def test_one_that_took_long_is_not_the_rule_and_old_ones_are_forgotten() -> None:
    assert learned(150, 150, 150, 150, 5000).base_ms(1) == 150
    assert learned(*[900] * 8, *[150] * 8).base_ms(1) == 150


def test_a_freeze_that_was_spent_sending_says_nothing() -> None:
    assert learned(*[2000] * 5, left=BANDWIDTH).base_ms(1) == FIXED_FREEZE_MS


def test_what_many_processes_took_is_no_reason_to_expect_it_of_one() -> None:
    many = Freezes().base_ms(16)
    assert learned(*[many] * 5, processes=16).base_ms(1) == FIXED_FREEZE_MS


@given(st.lists(st.floats(0, 1e6), max_size=20), st.integers(0, 5000))
def test_it_always_says_something(freezes_ms: list[float], processes: int) -> None:
    assert learned(*freezes_ms).base_ms(processes) >= FIXED_FREEZE_MS // 2
