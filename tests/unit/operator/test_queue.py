"""Limits per node and cluster."""

from __future__ import annotations

import pytest

from godwit_api.errors import Retryable
from godwit_operator.queue import Queue


def test_limits_and_order() -> None:
    queue = Queue(per_cluster=3, per_node=1)
    queue.enter("a", {"n1", "n2"})
    queue.enter("a", {"n1", "n2"})  # again, after a restart of its step
    with pytest.raises(Retryable, match="node n1"):
        queue.enter("b", {"n1"})
    with pytest.raises(Retryable, match="node n1"):
        queue.enter("c", {"n1"})
    queue.enter("d", {"n3"})
    queue.leave("a")
    with pytest.raises(Retryable, match="first"):
        queue.enter("c", {"n1"})
    queue.enter("b", {"n1"})
    queue.enter("e", {"n4"})
    with pytest.raises(Retryable, match="cluster"):
        queue.enter("f", {"n5"})
    assert queue.members() == {"b", "c", "d", "e", "f"}


def test_what_ran_before_a_restart_counts() -> None:
    queue = Queue(per_cluster=1, per_node=1)
    queue.resume("a", {"n1"})
    with pytest.raises(Retryable):
        queue.enter("b", {"n2"})
