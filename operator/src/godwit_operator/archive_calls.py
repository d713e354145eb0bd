"""Calls about archives, to the same agents over the same channels."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar, cast

import grpc

from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb.agent_pb2_grpc import CheckpointsStub
from godwit_api.wire import error_of

T = TypeVar("T")
_WRITE_SECONDS = 1800.0  # copying, packing and encrypting, whatever the pod's size
_READ_SECONDS = 900.0


class ArchiveAgent(Protocol):
    """What one node does with archives. Every call raises GodwitError."""

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointResponse: ...
    async def release(self, request: pb.ReleaseCheckpointRequest) -> None: ...
    async def discard(self, request: pb.DiscardArchiveRequest) -> None: ...
    async def inspect(self, request: pb.InspectArchiveRequest) -> pb.InspectArchiveResponse: ...
    async def prepare(self, request: pb.PrepareRestoreRequest) -> None: ...
    async def complete(
        self, request: pb.CompleteRestoreRequest, seconds: float
    ) -> pb.CompleteRestoreResponse: ...


class GrpcArchiveAgent:
    """The real one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = CheckpointsStub(channel)

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointResponse:
        call = self._stub.Checkpoint(request, timeout=_WRITE_SECONDS)
        return await _call(cast(Awaitable[pb.CheckpointResponse], call))

    async def release(self, request: pb.ReleaseCheckpointRequest) -> None:
        await _call(self._stub.ReleaseCheckpoint(request, timeout=30))

    async def discard(self, request: pb.DiscardArchiveRequest) -> None:
        await _call(self._stub.DiscardArchive(request, timeout=60))

    async def inspect(self, request: pb.InspectArchiveRequest) -> pb.InspectArchiveResponse:
        call = self._stub.InspectArchive(request, timeout=_READ_SECONDS)
        return await _call(cast(Awaitable[pb.InspectArchiveResponse], call))

    async def prepare(self, request: pb.PrepareRestoreRequest) -> None:
        await _call(self._stub.PrepareRestore(request, timeout=_READ_SECONDS))

    async def complete(
        self, request: pb.CompleteRestoreRequest, seconds: float
    ) -> pb.CompleteRestoreResponse:
        call = self._stub.CompleteRestore(request, timeout=seconds)
        return await _call(cast(Awaitable[pb.CompleteRestoreResponse], call))


async def _call(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from failure
