# ruff: noqa: N802  gRPC gives the method names
"""Checkpoints: what the operator may ask about archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from godwit_agent.app.agent import Agent
from godwit_agent.app.checkpointing import Plan
from godwit_agent.app.model import Pod
from godwit_agent.archive.sealed import KEY_BYTES
from godwit_agent.hostops.checkpoints.archives import Archives
from godwit_agent.server import auth, decode
from godwit_agent.server.edge import LongCalls, answer, deadline
from godwit_api.errors import Rejected
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc
from godwit_api.reasons import Reason

T = TypeVar("T")
_Context = grpc.ServicerContext
_MAX_MANIFEST = 4 << 20


class CheckpointsServicer(agent_pb2_grpc.CheckpointsServicer):
    """Every call is for the operator only and needs a deadline."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._long = LongCalls(max(agent.config.worker_threads // 4, 1))

    def Checkpoint(self, request: pb.CheckpointRequest, context: _Context) -> pb.CheckpointResponse:
        def work(until: float) -> pb.CheckpointResponse:
            plan = Plan(
                self._archives(request.archive),
                decode.name(request.archive.name, "archive.name"),
                _key(request.archive),
                request.leave_running,
                _manifest(request.manifest_json),
            )
            pod = decode.pod(request.pod)
            done = self._agent.checkpoints.run(
                decode.migration(request.migration),
                pod,
                plan,
                deadline=until,
                active=context.is_active,
            )
            return pb.CheckpointResponse(
                archive_bytes=done.archive_bytes,
                freeze_us=done.freeze_us,
                timings_us=done.timings_us,
                location=plan.archives.place(pod.namespace, plan.archive),
            )

        return self._serve(context, "Checkpoint", work)

    def ReleaseCheckpoint(
        self, request: pb.ReleaseCheckpointRequest, context: _Context
    ) -> pb.ReleaseCheckpointResponse:
        def work(_: float) -> pb.ReleaseCheckpointResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            self._agent.checkpoints.release(migration, pod)
            return pb.ReleaseCheckpointResponse()

        return self._serve(context, "ReleaseCheckpoint", work)

    def DiscardArchive(
        self, request: pb.DiscardArchiveRequest, context: _Context
    ) -> pb.DiscardArchiveResponse:
        def work(_: float) -> pb.DiscardArchiveResponse:
            namespace = decode.migration(request.migration).namespace
            name = decode.name(request.archive.name, "archive.name")
            self._archives(request.archive).clean(namespace, name)
            return pb.DiscardArchiveResponse()

        return self._serve(context, "DiscardArchive", work)

    def InspectArchive(
        self, request: pb.InspectArchiveRequest, context: _Context
    ) -> pb.InspectArchiveResponse:
        def work(_: float) -> pb.InspectArchiveResponse:
            namespace = decode.migration(request.migration).namespace
            name = decode.name(request.archive.name, "archive.name")
            archives = self._archives(request.archive)
            about = self._agent.restores.inspect(archives, namespace, name, _key(request.archive))
            return pb.InspectArchiveResponse(
                manifest_json=json.dumps(about["manifest"]),
                pod=about["pod"],
                created_unix=about["created"],
                node=about["node"],
            )

        return self._serve(context, "InspectArchive", work)

    def PrepareRestore(
        self, request: pb.PrepareRestoreRequest, context: _Context
    ) -> pb.PrepareRestoreResponse:
        def work(_: float) -> pb.PrepareRestoreResponse:
            self._agent.restores.prepare(
                decode.migration(request.migration),
                _restored_pod(request.pod),
                self._archives(request.archive),
                decode.name(request.archive.name, "archive.name"),
                _key(request.archive),
                decode.plan(request),
            )
            return pb.PrepareRestoreResponse()

        return self._serve(context, "PrepareRestore", work)

    def CompleteRestore(
        self, request: pb.CompleteRestoreRequest, context: _Context
    ) -> pb.CompleteRestoreResponse:
        def work(until: float) -> pb.CompleteRestoreResponse:
            migration = decode.migration(request.migration)
            ran = self._agent.restores.complete(migration, deadline=until, active=context.is_active)
            return pb.CompleteRestoreResponse(
                resumed_unix_ns=ran.resumed_unix_ns, timings_us=dict(ran.timings_us)
            )

        return self._serve(context, "CompleteRestore", work)

    def _archives(self, archive: pb.Archive) -> Archives:
        has_store = archive.HasField("store")
        return self._agent.archives(decode.store(archive.store) if has_store else None)

    def _serve(self, context: _Context, name: str, work: Callable[[float], T]) -> T:
        def authorised() -> T:
            auth.require_operator(context.auth_context())
            with self._long.enter():
                return work(deadline(context))

        return answer(context, name, authorised)


def _restored_pod(ref: pb.PodRef) -> Pod:
    """Has no address yet."""
    return Pod(
        decode.label(ref.namespace, "pod.namespace"),
        decode.name(ref.name, "pod.name"),
        decode.uid(ref.uid, "pod.uid"),
        "",
    )


def _key(archive: pb.Archive) -> bytes:
    if len(archive.key) != KEY_BYTES:
        raise Rejected(Reason.ARCHIVE_KEY, f"a key has {KEY_BYTES} bytes, not {len(archive.key)}")
    return archive.key


def _manifest(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if len(text) <= _MAX_MANIFEST else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Rejected(Reason.MALFORMED, "manifest_json is no object")
    return value
