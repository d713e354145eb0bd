"""Puts the servicers, health and TLS together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from godwit_agent.app.agent import Agent
from godwit_agent.server.checkpoints import CheckpointsServicer
from godwit_agent.server.identity import IdentityStore
from godwit_agent.server.node_agent import NodeAgentServicer
from godwit_agent.server.peer import PeerServicer
from godwit_api.pb import agent_pb2_grpc

_SERVICES = ("", "godwit.agent.v1.NodeAgent", "godwit.agent.v1.Peer")


class ControlServer:
    """The gRPC server of an agent. A certificate is needed before it can be made."""

    def __init__(
        self, agent: Agent, identity: IdentityStore, address: str, port: int, threads: int
    ) -> None:
        executor = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)]
        self._server = grpc.server(executor, options=options)
        self._health = health.HealthServicer()
        agent_pb2_grpc.add_NodeAgentServicer_to_server(NodeAgentServicer(agent), self._server)
        agent_pb2_grpc.add_PeerServicer_to_server(PeerServicer(agent), self._server)
        agent_pb2_grpc.add_CheckpointsServicer_to_server(CheckpointsServicer(agent), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = self._server.add_secure_port(f"{address}:{port}", identity.server_credentials())

    def start(self) -> None:
        self._server.start()
        for service in _SERVICES:
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float) -> None:
        """Refuses new calls at once and lets running ones end for ``grace_s``."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait(grace_s + 1.0)


class HealthServer:
    """The health service alone, without TLS: the kubelet's probes have no certificate.

    Live from the start of the process, ready (service ``ready``) when the agent serves.
    """

    def __init__(self, address: str, port: int) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="health"))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = self._server.add_insecure_port(f"{address}:{port}")
        self._health.set("ready", health_pb2.HealthCheckResponse.NOT_SERVING)

    def start(self) -> None:
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def ready(self) -> None:
        self._health.set("ready", health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        self._health.enter_graceful_shutdown()
        self._server.stop(0.5).wait()
