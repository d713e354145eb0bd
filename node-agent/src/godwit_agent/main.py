"""Starts the agent: settings, certificate, recovery, then the two servers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

# gRPC's fork handlers kill children of processes under load, and nothing here forks
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from godwit_agent import config as settings
from godwit_agent import log
from godwit_agent.app.agent import Agent
from godwit_agent.app.model import PeerNode
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.peers import GrpcPeer, Peer
from godwit_agent.app.sessions import SourceSession
from godwit_agent.config import Config
from godwit_agent.hostops.ports import Host
from godwit_agent.server.auth import node_of_certificate
from godwit_agent.server.enroll import Enroller, Renewal
from godwit_agent.server.identity import IdentityStore
from godwit_agent.server.serve import ControlServer, HealthServer
from godwit_agent.transfer import sender
from godwit_agent.transfer.receiver import TransferServer
from godwit_api import failpoints

_GRACE_S = 20.0


class Process:
    """Everything that runs in one agent process, made in the order in which it is started."""

    def __init__(self, config: Config, host: Host, identity: IdentityStore) -> None:
        self._config = config
        self._identity = identity
        self._streams = config.transfer_streams
        self.agent = Agent(config, host, peers=self._peer, connect=self._connect)
        self.transfer = TransferServer(
            config.node_ip,
            config.transfer_port,
            context=lambda: identity.transfer_context(server=True),
            node_of=node_of_certificate,
            admit=self.agent.target.admit,
        )
        self.control = ControlServer(
            self.agent, identity, config.node_ip, config.control_port, config.worker_threads
        )

    def start(self) -> None:
        self.agent.start()
        self.transfer.start()
        self.control.start()

    def stop(self) -> None:
        """A switch that is under way may end; the rest is taken up by the next process."""
        self.control.stop(_GRACE_S)
        self.agent.stop()
        self.transfer.stop()

    def _peer(self, node: PeerNode) -> Peer:
        return GrpcPeer(self._identity.node_channel(node.address, node.control_port, node.name))

    def _connect(self, session: SourceSession) -> Outlet:
        node = session.peer
        assert node, "Copy and Switch name the target"
        return sender.connect(
            node=node.name,
            address=node.address,
            port=node.transfer_port,
            context=self._identity.transfer_context(server=False),
            uid=session.migration.uid,
            epoch=session.migration.epoch,
            containers=session.processes.containers,
            streams=self._streams,
            pack=session.compress,
        )


def main() -> int:
    """Returns the exit code."""
    try:
        config = settings.load(os.environ)
    except settings.ConfigError as error:
        print(f"godwit-agent: {error}", file=sys.stderr)
        return 2
    log.setup(config.log_level)
    failpoints.enable(config.failpoints)
    log.info("starting", **config.summary())
    stop = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

    health = HealthServer(config.node_ip, config.health_port)
    health.start()
    identity = IdentityStore(config.identity_dir)
    enroller = Enroller(
        config.node_name, config.enrollment_address, config.ca_file, config.token_file
    )
    renewal = Renewal(enroller, identity)
    renewal.start()
    host = _host(config)
    while not stop.is_set() and not identity.ready(1.0):
        continue
    if not stop.is_set():
        process = Process(config, host, identity)
        process.start()
        health.ready()
        log.info("serving", node=config.node_name, address=config.node_ip)
        stop.wait()
        log.info("stopping")
        process.stop()
    renewal.stop()
    health.stop()
    return 0


def _host(config: Config) -> Host:
    from godwit_agent.hostops.real import real_host

    return real_host(config)
