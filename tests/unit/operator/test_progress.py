"""What people read of a copy."""

from __future__ import annotations

from godwit_api.pb import agent_pb2 as pb
from godwit_operator.progress import of_copy


def test_the_first_round_counts_down_from_the_size_of_the_pod() -> None:
    told = of_copy(pb.CopyProgress(round=1, transferred_bytes=300), 1000)
    assert (told["transferred_bytes"], told["remaining_bytes"]) == (300, 700)


def test_what_is_not_known_is_absent_not_zero() -> None:
    told = of_copy(pb.CopyProgress(round=1, transferred_bytes=300), 1000)
    unknown = {name for name, value in told.items() if value is None}
    assert unknown == {
        "dirty_bytes_per_second",
        "bandwidth_bytes_per_second",
        "cpu_percent",
        "predicted_freeze_milliseconds",
        "copy_seconds_left",
    }


def test_zero_pages_are_not_sent_so_more_may_be_found_than_goes() -> None:
    assert of_copy(pb.CopyProgress(round=1, transferred_bytes=1200), 1000)["remaining_bytes"] == 0


def test_a_later_round_tells_its_own_rest() -> None:
    progress = pb.CopyProgress(
        round=3, remaining_bytes=50, dirty_bytes_per_s=7, bandwidth_bytes_per_s=20
    )
    told = of_copy(progress, 1000)
    assert told["remaining_bytes"] == 50
    assert told["dirty_bytes_per_second"] == 7
    assert told["copy_seconds_left"] == 2.5


def test_an_idle_pod_writes_nothing_and_says_so() -> None:
    assert of_copy(pb.CopyProgress(round=2, converged=True), 1000)["dirty_bytes_per_second"] == 0
