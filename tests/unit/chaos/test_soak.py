"""What the soak hears, counts and makes of it."""

from __future__ import annotations

import json
import struct
from itertools import islice
from typing import Any

import pytest

from chaos import flat, samples, soak, soakreport
from chaos.faults import FAULTS
from chaos.listener import Numbers, datagram


def test_numbers_from_one_node_after_the_other_are_right() -> None:
    numbers = Numbers()
    told = [(1, "a"), (2, "a"), (5, "b"), (6, "b"), (7, "a")]
    assert [numbers.take(*one) for one in told] == [""] * 5
    assert (numbers.highest, numbers.node, numbers.late) == (7, "a", 0)


@pytest.mark.parametrize(
    "told", [[(1, "a"), (2, "a"), (2, "b")], [(1, "a"), (3, "b"), (2, "a")], [(9, "a"), (9, "a")]]
)
def test_what_two_copies_would_say_is_wrong(told: list[tuple[int, str]]) -> None:
    numbers = Numbers()
    said = [numbers.take(*one) for one in told]
    assert said[:-1] == [""] * (len(told) - 1)
    assert said[-1]


def test_the_network_may_swap_two_numbers_of_one_node() -> None:
    numbers = Numbers()
    assert not any(numbers.take(number, "a") for number in (1, 3, 2, 4))
    assert numbers.late == 1


def test_a_process_that_has_begun_anew_is_noticed() -> None:
    numbers = Numbers()
    for number in range(1, 60_002):
        numbers.take(number, "a")
    assert "anew" in numbers.take(1, "a")


def test_only_numbers_to_the_port_are_heard() -> None:
    def packet(port: int, text: bytes, protocol: int = 17) -> bytes:
        header = bytearray(20)
        header[0], header[9] = 0x45, protocol
        return bytes(header) + struct.pack("!HHHH", 1, port, 8 + len(text), 0) + text + b"\0" * 6

    assert datagram(packet(9, b"17"), 9) == 17
    assert datagram(packet(8, b"17"), 9) is None
    assert datagram(packet(9, b"17", protocol=6), 9) is None
    assert datagram(packet(9, b"x"), 9) is None
    assert datagram(packet(9, b"17")[:22], 9) is None


def test_the_faults_follow_from_the_seed_and_kills_from_the_first_half() -> None:
    plan, again, other = (list(islice(soak.schedule(seed), 120)) for seed in (7, 7, 8))
    assert plan == again != other
    assert {first for first, _, _ in plan} == {*soak.KILLS, *soak.OTHERS} <= set(FAULTS)
    assert {second for _, second, _ in plan} == set(soak.OTHERS)


@pytest.mark.parametrize(
    ("phase", "here", "excused", "right"),
    [
        ("Succeeded", "n2", False, True),
        ("Succeeded", "n1", True, False),
        ("Aborted", "n1", True, True),
        ("Aborted", "n1", False, False),
        ("Aborted", "n2", True, False),
        ("Deleted", "n1", True, True),
        ("Deleted", "n1", False, False),
        ("Stalled", "n1", True, False),
        (None, "n1", True, False),
    ],
)
def test_ends_of_a_migration(phase: str, here: str, excused: bool, right: bool) -> None:
    assert (not soak.misplaced(phase, here, "n1", "n2", excused=excused)) == right


def points(*values: float) -> list[tuple[float, float]]:
    return [(float(minute), value) for minute, value in enumerate(values)]


def test_growth_is_what_a_line_says_and_not_an_outlier() -> None:
    name = ("n1", "routes")
    even = flat.judge(name, points(*[20.0] * 30))
    assert even
    assert even.flat
    outlier = flat.judge(name, points(*[20.0] * 15, 90.0, *[20.0] * 14))
    assert outlier
    assert outlier.flat
    leak = flat.judge(name, points(*[20.0 + number for number in range(30)]))
    assert leak
    assert not leak.flat
    assert leak.growth == 24  # of 25 samples behind the warm-up
    assert flat.judge(name, points(*[20.0] * 14)) is None


def test_memory_that_warms_up_is_flat_and_memory_that_leaks_is_not() -> None:
    name = ("agent", "n1", "7@1", "rss_kib")
    warm = [93_000.0 + 400 * minute for minute in range(25)] + [103_000.0] * 30
    warmed = flat.judge(name, points(*warm))
    assert warmed
    assert warmed.flat
    leak = flat.judge(name, points(*[93_000.0 + 250 * minute for minute in range(55)]))
    assert leak
    assert not leak.flat
    assert flat.judge(name, points(*warm[:18])) is None


def minute(number: int, **changes: Any) -> dict[str, Any]:
    process = {"kind": "agent", "node": "n1", "series": "7@1", "rss_kib": 90_000, "fds": 20,
               "threads": 9}  # fmt: skip
    sample = {"processes": [process], "nodes": {"n1": {"routes": 9}}, "api": {"slices": 4}}
    move = {"phase": "Succeeded", "reason": None, "freeze_ms": 80.0, "wrong": []}
    return {
        "kind": "minute", "minute": number, "fault": "kill CRIU", "moves": [move], "gap_ms": 90.0,
        "replies": 100 * number, "wrong": [], "sample": sample, "seconds": 58.0,
    } | changes  # fmt: skip


def test_a_restarted_process_begins_a_new_series() -> None:
    minutes = [minute(number) for number in range(10)]
    for line in minutes[6:]:
        line["sample"]["processes"][0] |= {"series": "8@2"}
    lengths = {name[2]: len(those) for name, those in flat.series(minutes).items() if len(name) > 2}
    assert lengths == {"7@1": 6, "8@2": 4}


def test_the_report_is_of_the_last_run() -> None:
    begin = {"kind": "begin", "at": "x", "commit": "abc", "seed": 1, "minutes": 30}
    old = [begin, minute(1, wrong=["two copies ran"])]
    new = [begin | {"seed": 2}, *(minute(number) for number in range(1, 31)), {"kind": "end"}]
    text = soakreport.render(json.dumps(line) for line in [*old, *new])
    assert "seed 2" in text
    assert "30 migrations: 30 Succeeded" in text
    assert "**0 violations**" in text
    assert "5 series were long enough to be judged, 0 of them have grown" in text
    assert "| agent: memory (RSS, MiB) | 1 | 15 | 87.9 | +0.00 | 4.4 |" in text
    broken = soakreport.render(json.dumps(line) for line in old)
    assert "It has not come to its end" in broken
    assert "minute 1: two copies ran" in broken


def test_own_processes_are_told_from_others() -> None:
    assert samples.kind_of(["/usr/bin/python3", "-m", "godwit_agent"]) == "agent"
    assert samples.kind_of(["python3", "-m", "godwit_operator"]) == "operator"
    assert samples.kind_of(["python3", "-m", "godwit_agent.install"]) == ""
    assert samples.kind_of([""]) == ""
