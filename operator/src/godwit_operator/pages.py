"""After the commit of a post-copy: until the target has fetched the rest of the pod's memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.migration import Failure, PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.agents import Agent
from godwit_operator.messages import reference
from godwit_operator.plan import Done, Failed, Result
from godwit_operator.status import Learned

_LOOK_SECONDS = 0.3
_PATIENCE_SECONDS = 3.0
_OVER = frozenset({"Arrived", "Finished"})  # the last line of the target's journal

Report = Callable[[Learned], Awaitable[None]]
_NOTHING_LEFT = Learned(status={"remaining_bytes": 0, "copy_seconds_left": None})


async def await_pages(
    target: Agent,
    migration: PodMigration,
    report: Report,
    source_fenced: Callable[[], Awaitable[bool]],
) -> tuple[Result, Learned]:
    """Reports how much is left. ``Failed``: the copy has been killed, the process is lost.

    ``Retryable`` while nothing comes, with the way out: it goes on when the source is back.
    """
    left, since = -1, time.monotonic()
    began, begin = -1, time.monotonic()
    while True:
        record = await _record(target, migration)
        if record.HasField("lost"):
            return Failed(Failure(reason=record.lost.reason, message=record.lost.message)), (
                _NOTHING_LEFT
            )
        if record.step in _OVER:
            return Done(), _NOTHING_LEFT
        if record.missing_bytes != left:
            left, since = record.missing_bytes, time.monotonic()
            began = left if began < 0 else began
            await report(_learned(left, (began - left) / max(time.monotonic() - begin, 1e-3)))
        elif time.monotonic() - since > _PATIENCE_SECONDS:
            await _give_up_if(target, migration, left, source_fenced)
        await asyncio.sleep(_LOOK_SECONDS)


async def _record(target: Agent, migration: PodMigration) -> pb.MigrationRecord:
    for record in await target.get_migration(migration.metadata.uid):
        if record.epoch == migration.status.epoch and record.role == pb.ROLE_TARGET:
            return record
    message = f"The agent of node {migration.status.target_node} does not know this migration"
    raise Retryable(Reason.UNKNOWN_MIGRATION, message)


async def _give_up_if(
    target: Agent,
    migration: PodMigration,
    left: int,
    source_fenced: Callable[[], Awaitable[bool]],
) -> None:
    """No page has come for a while. Without a fenced source that is no reason to kill."""
    source = migration.status.source_node
    if not await source_fenced():
        message = (
            f"{left} bytes of the pod's memory are still on node {source} and do not come. What "
            "needs them waits. If that node cannot come back, delete the Node: then the pod is "
            "given up, and starts anew"
        )
        raise Retryable(Reason.SOURCE_UNREACHABLE, message, delay_seconds=1.0)
    try:
        await target.run_fenced(pb.RunRequest(migration=reference(migration)))
    except Rejected:
        return  # it is lost; the record says so
    except GodwitError as error:
        raise Retryable(error.reason, error.message) from error


def _learned(left: int, rate: float) -> Learned:
    seconds = round(left / rate, 1) if rate > 0 else None
    return Learned(status={"remaining_bytes": left, "copy_seconds_left": seconds})
