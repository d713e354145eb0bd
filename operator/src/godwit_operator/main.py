"""The process: kopf for watching and lifecycle, our servers and loops beside it."""

from __future__ import annotations

import os

# A fork in a process that runs gRPC kills it; nothing here forks, and nothing shall.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# kopf asks for a user name; a container's numeric user has none.
os.environ.setdefault("USER", "godwit")

import asyncio
import logging
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

import kopf
from kopf._core.engines.peering import Identity

from godwit_api import failpoints
from godwit_api.identity import OPERATOR_DNS_NAME
from godwit_api.migration import FINAL_PHASES, GROUP, PLURAL, VERSION, Phase
from godwit_operator import kube, log
from godwit_operator.addresses import Addresses
from godwit_operator.agents import GrpcAgentPool
from godwit_operator.archive_calls import ArchiveAgent, GrpcArchiveAgent
from godwit_operator.checkpoint import ArchivePorts
from godwit_operator.checkpoint_handlers import register
from godwit_operator.config import Config, load
from godwit_operator.driver import Driver
from godwit_operator.effects import Ports
from godwit_operator.enrollment import (
    Enrollment,
    OperatorIdentity,
    load_authority,
    serve,
)
from godwit_operator.events import COMPONENT, Events
from godwit_operator.housekeeping import Housekeeping
from godwit_operator.queue import Queue

logger = logging.getLogger(__name__)
FINALIZER = f"{GROUP}/cleanup"


def under_way(status: Mapping[str, Any], **_: Any) -> bool:
    """Whether a migration needs a daemon, and the finalizer."""
    return status.get("phase") not in FINAL_PHASES


def undone(status: Mapping[str, Any], **_: Any) -> bool:
    """Whether deleting the object has to undo something first."""
    return under_way(status) or status.get("phase") == Phase.STALLED


class DaemonStop:
    """Ends with the daemon: at the exit, and when the deletion handler takes over."""

    def __init__(self, stopped: kopf.DaemonStopped) -> None:
        self._stopped = stopped

    def stopped(self) -> bool:
        return bool(self._stopped)

    def cancelled(self) -> bool:
        return False

    async def wait(self) -> None:
        await self._stopped.wait()


class DeletionStop:
    """Runs to the end, as a cancellation."""

    def stopped(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return True

    async def wait(self) -> None:
        await asyncio.Event().wait()


class Operator:
    """Everything that lives as long as the process."""

    def __init__(self, config: Config, api: kube.HttpKubeApi) -> None:
        self.config = config
        self.api = api
        self.events = Events(api, socket.gethostname())
        self.queue = Queue(config.migrations_per_cluster, config.migrations_per_node)
        self.ports: Ports | None = None
        self._pool: GrpcAgentPool | None = None
        self._server: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start(self) -> None:
        """Identity, Enrollment, loops."""
        config = self.config
        authority = await load_authority(self.api, config.namespace)
        identity = OperatorIdentity(authority, [OPERATOR_DNS_NAME])
        self._pool = GrpcAgentPool(self.api, config.namespace, identity.current)
        addresses = Addresses(self.api, self._pool)
        self.ports = Ports(self.api, self._pool, addresses, self.queue, config.namespace)
        user = f"system:serviceaccount:{config.namespace}:{config.agent_service_account}"
        enrollment = Enrollment(self.api, authority, user)
        self._server, _ = await serve(enrollment, identity, f"[::]:{config.enrollment_port}")
        await self._count_running()
        self._tasks = [
            asyncio.create_task(addresses.keep(config.address_seconds)),
            asyncio.create_task(
                Housekeeping(self.api, self.queue).keep(config.housekeeping_seconds)
            ),
        ]

    async def _count_running(self) -> None:
        """What was under way before a restart counts before anything new is admitted."""
        for item in await self.api.list(kube.MIGRATIONS):
            status = item.get("status", {})
            if under_way(status) and status.get("epoch"):
                nodes = {status.get("sourceNode", ""), status.get("targetNode", "")} - {""}
                self.queue.resume(item["metadata"]["uid"], nodes)

    def archive_ports(self) -> ArchivePorts:
        """For PodCheckpoint and PodRestore."""
        pool = self._pool
        assert pool is not None

        async def archives(node: str) -> ArchiveAgent:
            return GrpcArchiveAgent(await pool.channel(node))

        return ArchivePorts(self.api, pool, archives, self.config.namespace)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(1)
        if self._pool is not None:
            await self._pool.close()
        await self.api.close()

    async def drive(
        self, uid: str, namespace: str, name: str, stop: DaemonStop | DeletionStop
    ) -> None:
        """Drive one migration; never two drivers of one object at a time."""
        assert self.ports is not None
        lock = self._locks.setdefault(uid, asyncio.Lock())  # in there as long as it is used
        async with lock:
            await Driver(self.ports, self.events, namespace, name, stop).run()


def registry(operator: Operator) -> kopf.OperatorRegistry:
    """kopf's handlers: they only delegate."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.startup(registry=handlers, backoff=2.0)
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await operator.start()
        logger.info("operator started", extra=asdict(operator.config))

    @kopf.on.cleanup(registry=handlers)
    async def cleanup(**_: Any) -> None:
        await operator.stop()

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        if "KUBECONFIG" in os.environ:
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs)

    @kopf.daemon(
        GROUP, VERSION, PLURAL, registry=handlers, when=under_way, cancellation_polling=1.0
    )
    async def migrate(
        uid: str, namespace: str | None, name: str, stopped: kopf.DaemonStopped, **_: Any
    ) -> None:
        await operator.drive(uid, namespace or "", name, DaemonStop(stopped))

    @kopf.on.delete(GROUP, VERSION, PLURAL, registry=handlers, when=undone, backoff=2.0)
    async def cancel(uid: str, namespace: str | None, name: str, **_: Any) -> None:
        await operator.drive(uid, namespace or "", name, DeletionStop())

    register(handlers, operator.archive_ports)
    return handlers


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's own traces in the cluster carry our name, and there are few."""
    settings.persistence.finalizer = FINALIZER
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    settings.posting.enabled = False  # Events are explicit
    settings.posting.reporting_component = COMPONENT
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300


async def run(config: Config) -> None:
    """Until the process is told to end."""
    operator = Operator(config, kube.HttpKubeApi(kube.access()))
    namespaces = [name for name in config.watch_namespaces.split(",") if name]
    await kopf.operator(
        registry=registry(operator),
        standalone=True,
        identity=Identity("godwit-operator"),  # kopf would ask for a user name, and there is none
        clusterwide=not namespaces,
        namespaces=namespaces,
        liveness_endpoint=f"http://0.0.0.0:{config.health_port}/healthz",
    )


def main() -> None:
    """Command line entry."""
    config = load(os.environ)
    log.configure(config.log_format, config.log_level)
    failpoints.enable(config.failpoints)
    asyncio.run(run(config))
