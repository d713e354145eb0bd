"""Waiting for the successor at its gate: who knows best why it will never come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest

from godwit_api.errors import Aborted, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_operator import successor
from godwit_operator.agents import Agent
from godwit_operator.handover import Handover

FAILED = {"waiting": {"reason": "RunContainerError", "message": "claimed before"}}


def pod(state: dict[str, Any]) -> Pod:
    status = {"phase": "Pending", "containerStatuses": [{"name": "c", "state": state}]}
    return msgspec.convert({"metadata": {"name": "p"}, "status": status}, Pod)


async def wait(word: Callable[[], Awaitable[None]], state: dict[str, Any]) -> None:
    class Spoken:
        async def await_gate(self, request: pb.AwaitGateRequest, seconds: float) -> None:
            await word()

        async def successor(self) -> Pod:
            return pod(state)

    both = Spoken()
    await successor.await_gate(
        cast("Agent", both), cast("Handover", both), pb.MigrationRef(uid="m"), 10
    )


async def forever() -> None:
    await asyncio.sleep(3600)


async def reached() -> None:
    await asyncio.sleep(0.05)


async def restarted() -> None:
    await asyncio.sleep(0.05)
    raise Aborted(Reason.AGENT_RESTARTED, "the target's agent was restarted")


async def unreachable() -> None:
    raise Retryable(Reason.AGENT_UNREACHABLE, "no answer")


async def test_the_agents_reason_is_better_than_the_pods() -> None:
    with pytest.raises(Aborted) as caught:
        await wait(restarted, FAILED)
    assert caught.value.reason is Reason.AGENT_RESTARTED


@pytest.mark.parametrize("word", [forever, unreachable])
async def test_without_a_word_of_the_agents_the_pods_reason_counts(
    word: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "_WORD_SECONDS", 0.1)
    with pytest.raises(Aborted, match="claimed before") as caught:
        await wait(word, FAILED)
    assert caught.value.reason is Reason.SUCCESSOR_FAILED


async def test_a_gate_that_is_reached_counts() -> None:
    await wait(reached, FAILED)


async def test_an_agent_that_cannot_be_reached_is_asked_again() -> None:
    with pytest.raises(Retryable):
        await wait(unreachable, {})
