# ruff: noqa: N802  gRPC gives the method names
"""NodeAgent: what the operator may ask. Decodes, calls the application, encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from godwit_agent.app.agent import Agent
from godwit_agent.server import auth, decode, encode
from godwit_agent.server.edge import LongCalls, answer, deadline, stream
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc

T = TypeVar("T")
_Context = grpc.ServicerContext


class NodeAgentServicer(agent_pb2_grpc.NodeAgentServicer):
    """One method per call; every one is for the operator only and needs a deadline."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._long = LongCalls(agent.config.worker_threads // 2)

    def GetNode(self, request: pb.GetNodeRequest, context: _Context) -> pb.NodeReport:
        return _serve(context, "GetNode", lambda _: encode.node_report(self._agent))

    def CheckSource(
        self, request: pb.CheckSourceRequest, context: _Context
    ) -> pb.CheckSourceResponse:
        def work(_: float) -> pb.CheckSourceResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            volumes = decode.volumes(list(request.volumes))
            found = self._agent.source.check(migration, pod, volumes)
            return encode.inspection(found, self._agent.node_facts())

        return _serve(context, "CheckSource", work)

    def CheckTarget(
        self, request: pb.CheckTargetRequest, context: _Context
    ) -> pb.CheckTargetResponse:
        def work(_: float) -> pb.CheckTargetResponse:
            decode.pod(request.pod)
            obstacles = self._agent.target.check(
                decode.migration(request.migration),
                decode.peer(request.source, "source"),
                decode.node_report(request.source_report),
                decode.volumes(list(request.volumes)),
                decode.profiles(request),
            )
            return pb.CheckTargetResponse(obstacles=map(encode.obstacle, obstacles))

        return _serve(context, "CheckTarget", work)

    def PrepareTarget(
        self, request: pb.PrepareTargetRequest, context: _Context
    ) -> pb.PrepareTargetResponse:
        def work(_: float) -> pb.PrepareTargetResponse:
            self._agent.target.prepare(
                decode.migration(request.migration),
                decode.pod(request.pod),
                decode.peer(request.source, "source"),
                decode.containers(list(request.containers)),
                memory_bytes=decode.size(request.memory_bytes, "memory_bytes"),
                volumes=decode.volumes(list(request.volumes)),
            )
            return pb.PrepareTargetResponse()

        return _serve(context, "PrepareTarget", work)

    def Copy(self, request: pb.CopyRequest, context: _Context) -> Iterator[pb.CopyProgress]:
        def work() -> Iterator[pb.CopyProgress]:
            with self._long.enter():
                yield from copy()

        def copy() -> Iterator[pb.CopyProgress]:
            auth.require_operator(context.auth_context())
            until = deadline(context)
            progress = self._agent.source.copy(
                decode.migration(request.migration),
                decode.pod(request.pod),
                decode.peer(request.target, "target"),
                decode.copy_policy(request),
                deadline=until,
                active=context.is_active,
                volumes=decode.volumes(list(request.volumes)),
            )
            yield from map(encode.copy_progress, progress)

        return stream(context, "Copy", work)

    def Guard(self, request: pb.GuardRequest, context: _Context) -> pb.GuardResponse:
        def work(_: float) -> pb.GuardResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            self._agent.source.guard(migration, pod)
            return pb.GuardResponse()

        return _serve(context, "Guard", work)

    def ExpectPod(self, request: pb.ExpectPodRequest, context: _Context) -> pb.ExpectPodResponse:
        def work(_: float) -> pb.ExpectPodResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            self._agent.target.expect(migration, pod, decode.plan(request))
            return pb.ExpectPodResponse()

        return _serve(context, "ExpectPod", work)

    def AwaitGate(self, request: pb.AwaitGateRequest, context: _Context) -> pb.AwaitGateResponse:
        def work(until: float) -> pb.AwaitGateResponse:
            migration = decode.migration(request.migration)
            with self._long.enter():
                native = self._agent.target.await_gate(migration, until, context.is_active)
            return pb.AwaitGateResponse(native_ip=native)

        return _serve(context, "AwaitGate", work)

    def Switch(self, request: pb.SwitchRequest, context: _Context) -> pb.SwitchResponse:
        def work(until: float) -> pb.SwitchResponse:
            with self._long.enter():
                outcome = self._agent.source.switch(
                    decode.migration(request.migration),
                    decode.pod(request.pod),
                    decode.peer(request.target, "target"),
                    budget_ms=decode.milliseconds(request.freeze_budget_ms, "freeze_budget_ms"),
                    timeout_ms=decode.milliseconds(request.freeze_timeout_ms, "freeze_timeout_ms"),
                    deadline=until,
                    post_copy=request.post_copy,
                )
            return encode.outcome(outcome)

        return _serve(context, "Switch", work)

    def FinishSource(
        self, request: pb.FinishSourceRequest, context: _Context
    ) -> pb.FinishSourceResponse:
        def work(_: float) -> pb.FinishSourceResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            self._agent.source.finish(migration, pod, lost=request.lost)
            return pb.FinishSourceResponse()

        return _serve(context, "FinishSource", work)

    def FinishTarget(
        self, request: pb.FinishTargetRequest, context: _Context
    ) -> pb.FinishTargetResponse:
        def work(_: float) -> pb.FinishTargetResponse:
            self._agent.target.finish(decode.migration(request.migration))
            return pb.FinishTargetResponse()

        return _serve(context, "FinishTarget", work)

    def AbortSource(
        self, request: pb.AbortSourceRequest, context: _Context
    ) -> pb.AbortSourceResponse:
        def work(_: float) -> pb.AbortSourceResponse:
            migration, pod = decode.migration(request.migration), decode.pod(request.pod)
            self._agent.source.abort(migration, pod, lift_guard=request.lift_guard)
            return pb.AbortSourceResponse()

        return _serve(context, "AbortSource", work)

    def AbortTarget(
        self, request: pb.AbortTargetRequest, context: _Context
    ) -> pb.AbortTargetResponse:
        def work(_: float) -> pb.AbortTargetResponse:
            self._agent.target.abort(decode.migration(request.migration))
            return pb.AbortTargetResponse()

        return _serve(context, "AbortTarget", work)

    def RunFenced(self, request: pb.RunRequest, context: _Context) -> pb.RunResponse:
        def work(_: float) -> pb.RunResponse:
            ran = self._agent.target.run_fenced(decode.migration(request.migration))
            return pb.RunResponse(resumed_unix_ns=ran.resumed_unix_ns, timings_us=ran.timings_us)

        return _serve(context, "RunFenced", work)

    def GetMigration(
        self, request: pb.GetMigrationRequest, context: _Context
    ) -> pb.GetMigrationResponse:
        def work(_: float) -> pb.GetMigrationResponse:
            records = self._agent.records(decode.uid(request.uid, "uid"))
            return pb.GetMigrationResponse(records=map(encode.record, records))

        return _serve(context, "GetMigration", work)

    def SyncAddresses(
        self, request: pb.SyncAddressesRequest, context: _Context
    ) -> pb.SyncAddressesResponse:
        def work(_: float) -> pb.SyncAddressesResponse:
            wanted = decode.addresses(list(request.addresses))
            return pb.SyncAddressesResponse(released=self._agent.addresses.sync(wanted))

        return _serve(context, "SyncAddresses", work)


def _serve(context: _Context, name: str, work: Callable[[float], T]) -> T:
    def authorised() -> T:
        auth.require_operator(context.auth_context())
        return work(deadline(context))

    return answer(context, name, authorised)
