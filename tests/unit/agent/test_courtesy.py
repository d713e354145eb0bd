"""How a copy finds the rate at which others find the link free, against a model of a link."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.transfer.courtesy import Courtesy, Sample

_TICK_S = 0.017
_MIN_RTT_US = 12
_ANY = 10_000_000_000


class Link:
    """A plain queue in front of ``rate`` bytes/s, ``others`` of them taken by somebody else."""

    def __init__(self, rate: float, others: float = 0.0) -> None:
        self.rate, self.others = rate, others
        self.queued = 0.0
        self.acked = 0.0
        self.longest_us = 0
        self.in_queue_s = 0.0

    def send(self, pace: int, seconds: float) -> Sample:
        free = self.rate - self.others
        offered = min(pace or _ANY, _ANY) * seconds
        # the sender's window is full at 5 ms, as that of a real one is somewhere
        taken = min(offered, max(free * (seconds + 0.005) - self.queued, 0))
        waiting = max(self.queued + taken - free * seconds, 0.0)
        self.acked += taken + self.queued - waiting
        self.queued = waiting
        wait_us = round(self.queued / free * 1e6)
        self.longest_us = max(self.longest_us, wait_us)
        self.in_queue_s += seconds if wait_us >= 500 else 0.0
        return Sample(_MIN_RTT_US + wait_us, _MIN_RTT_US, int(self.acked))


def drive(courtesy: Courtesy, link: Link, seconds: float, since: float = 0.0) -> list[int]:
    """Rates, one per tick."""
    rates = []
    pace = courtesy.observe(since, link.send(courtesy.rate, 0.0))
    for tick in itertools.takewhile(lambda n: n * _TICK_S < seconds, itertools.count(1)):
        pace = courtesy.observe(since + tick * _TICK_S, link.send(pace, _TICK_S))
        rates.append(pace)
    return rates


def test_a_full_link_gets_most_of_what_it_carries_and_no_queue() -> None:
    courtesy, link = Courtesy(), Link(125e6)
    drive(courtesy, link, 2.0)
    link.acked, link.longest_us = 0.0, 0
    rates = drive(courtesy, link, 4.0, since=2.0)
    assert all(0.9 * 125e6 <= one <= 125e6 for one in rates)
    assert link.acked > 0.9 * 125e6 * 4
    assert link.longest_us < 500


def test_others_hardly_ever_wait_behind_what_it_tries() -> None:
    courtesy, link = Courtesy(), Link(125e6)
    drive(courtesy, link, 30.0)
    assert link.in_queue_s < 0.015 * 30
    assert link.acked > 0.96 * 125e6 * 30


def test_a_first_look_at_a_bad_moment_costs_little() -> None:
    courtesy, link = Courtesy(), Link(125e6, others=110e6)
    drive(courtesy, link, 0.3)
    link.others = 0.0
    link.acked = 0.0
    drive(courtesy, link, 4.0, since=0.3)
    assert link.acked > 0.6 * 125e6 * 4


def test_a_limit_below_the_link_ends_the_search() -> None:
    courtesy, acked = Courtesy(50_000_000), 0
    for n in range(100_000):  # half an hour, a queue at its beginning only
        acked += 50_000_000 // 50
        courtesy.observe(n * 0.02, Sample(20_000 if n < 20 else 11, 10, acked))
    assert courtesy.rate == 50_000_000


def test_without_a_queue_nothing_is_held_back() -> None:
    courtesy = Courtesy()
    samples = (Sample(rtt, 10, n * 2_000_000) for n, rtt in enumerate([20, 6000, 300, 15] * 50))
    assert {courtesy.observe(n * 0.01, sample) for n, sample in enumerate(samples)} == {0}


def test_it_finds_a_link_that_has_become_free() -> None:
    courtesy, link = Courtesy(), Link(125e6, others=60e6)
    assert drive(courtesy, link, 2.0)[-1] < 65e6
    link.others = 0.0
    drive(courtesy, link, 12.0, since=2.0)
    link.acked = 0.0
    drive(courtesy, link, 5.0, since=14.0)
    assert link.acked > 0.85 * 125e6 * 5


def test_others_that_never_stop_leave_it_half() -> None:
    courtesy = Courtesy()
    acked = 0
    for n in range(2000):  # a queue that does not depend on us, and a share that follows our rate
        acked += int((courtesy.rate or 100_000_000) * 0.9 * 0.02)
        courtesy.observe(n * 0.02, Sample(20_000, 10, acked))
    assert courtesy.rate >= 0.4 * 100_000_000


@given(
    st.integers(1, 10**10),
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**8)), max_size=60),
)
def test_a_limit_is_never_exceeded(limit: int, seen: list[tuple[int, int]]) -> None:
    courtesy, acked = Courtesy(limit), 0
    for n, (rtt, more) in enumerate(seen):
        acked += more
        assert 0 < courtesy.observe(n * 0.06, Sample(rtt, 1, acked)) <= limit


def test_what_has_been_said_once_holds_for_the_limit_too() -> None:
    assert Courtesy().rate == 0
    assert Courtesy(100).rate == 100
