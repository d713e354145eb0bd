# ruff: noqa: N802  gRPC gives the method names
"""Peer: what the other agent of the same migration may ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from godwit_agent.app.agent import Agent
from godwit_agent.app.model import Migration
from godwit_agent.server import auth, decode, encode
from godwit_agent.server.edge import answer, deadline
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc

T = TypeVar("T")
_Context = grpc.ServicerContext


class PeerServicer(agent_pb2_grpc.PeerServicer):
    """The application checks that the calling node is the one this migration names."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def Arm(self, request: pb.ArmRequest, context: _Context) -> pb.ArmResponse:
        def work(migration: Migration, node: str, until: float) -> pb.ArmResponse:
            self._agent.target.arm(migration, node)
            return pb.ArmResponse()

        return _serve(request.migration, context, "Arm", work)

    def Restore(self, request: pb.RestoreRequest, context: _Context) -> pb.RestoreResponse:
        def work(migration: Migration, node: str, until: float) -> pb.RestoreResponse:
            outgoing = decode.outgoing(list(request.outgoing))
            restored = self._agent.target.restore(
                migration, node, until, outgoing, post_copy=request.post_copy
            )
            return pb.RestoreResponse(
                timings_us=restored.timings_us,
                processes=restored.processes,
                missing_bytes=restored.missing_bytes,
            )

        return _serve(request.migration, context, "Restore", work)

    def TakeRoute(self, request: pb.TakeRouteRequest, context: _Context) -> pb.TakeRouteResponse:
        def work(migration: Migration, node: str, until: float) -> pb.TakeRouteResponse:
            self._agent.target.take_route(migration, node)
            return pb.TakeRouteResponse()

        return _serve(request.migration, context, "TakeRoute", work)

    def Run(self, request: pb.RunRequest, context: _Context) -> pb.RunResponse:
        def work(migration: Migration, node: str, until: float) -> pb.RunResponse:
            ran = self._agent.target.run(migration, node)
            return pb.RunResponse(resumed_unix_ns=ran.resumed_unix_ns, timings_us=ran.timings_us)

        return _serve(request.migration, context, "Run", work)

    def AbortRestore(
        self, request: pb.AbortRestoreRequest, context: _Context
    ) -> pb.AbortRestoreResponse:
        def work(migration: Migration, node: str, until: float) -> pb.AbortRestoreResponse:
            self._agent.target.abort_restore(migration, node)
            return pb.AbortRestoreResponse()

        return _serve(request.migration, context, "AbortRestore", work)

    def Committed(self, request: pb.CommittedRequest, context: _Context) -> pb.CommittedResponse:
        def work(migration: Migration, node: str, until: float) -> pb.CommittedResponse:
            decision = self._agent.source.decision(migration, node)
            return pb.CommittedResponse(committed=decision.committed, aborted=decision.aborted)

        return _serve(request.migration, context, "Committed", work)

    def Pages(self, request: pb.PagesRequest, context: _Context) -> pb.PagesResponse:
        def work(migration: Migration, node: str, until: float) -> pb.PagesResponse:
            piece = decode.piece(request)
            return encode.extents(self._agent.source.pages(migration, node, piece))

        return _serve(request.migration, context, "Pages", work)

    def Arrived(self, request: pb.ArrivedRequest, context: _Context) -> pb.ArrivedResponse:
        def work(migration: Migration, node: str, until: float) -> pb.ArrivedResponse:
            self._agent.source.arrived(migration, node)
            return pb.ArrivedResponse()

        return _serve(request.migration, context, "Arrived", work)


def _serve(
    ref: pb.MigrationRef,
    context: _Context,
    name: str,
    work: Callable[[Migration, str, float], T],
) -> T:
    def authorised() -> T:
        node = auth.require_node(context.auth_context())
        return work(decode.migration(ref), node, deadline(context))

    return answer(context, name, authorised)
