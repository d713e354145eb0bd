"""Freezes take turns."""

from __future__ import annotations

import threading
import time

import pytest

from godwit_agent.app.turns import Turns
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason


def test_who_gets_no_turn_in_time_is_told_to_come_back() -> None:
    turns = Turns(1)
    soon = time.monotonic() + 0.01
    with turns.turn(soon):
        with pytest.raises(Retryable) as caught, turns.turn(soon):
            pass
        assert caught.value.reason is Reason.IN_PROGRESS
    with turns.turn(soon):
        pass


def test_never_more_than_allowed_and_everybody_in_the_end() -> None:
    turns, lock, holding, most, done = Turns(2), threading.Lock(), [0], [0], [0]
    two = threading.Barrier(2)

    def freeze() -> None:
        with turns.turn(time.monotonic() + 30):
            with lock:
                holding[0] += 1
                most[0] = max(most[0], holding[0])
            two.wait(30)  # so two do hold a turn together
            with lock:
                holding[0] -= 1
                done[0] += 1

    threads = [threading.Thread(target=freeze) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2]
    assert done == [8]


def test_a_failed_freeze_gives_its_turn_back() -> None:
    turns = Turns(1)
    with pytest.raises(ValueError, match="in the freeze"), turns.turn(time.monotonic() + 1):
        raise ValueError("in the freeze")
    with turns.turn(time.monotonic()):
        pass
