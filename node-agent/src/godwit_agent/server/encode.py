"""Values of the application to protobuf."""

from __future__ import annotations

from collections.abc import Iterable

from godwit_agent.app import model
from godwit_agent.app.agent import Agent, JournalSummary
from godwit_agent.app.journal import Role
from godwit_agent.hostops.model import Extent, Inspection, NodeFacts, Obstacle
from godwit_api.errors import GodwitError
from godwit_api.pb import agent_pb2 as pb

_ROLES = {Role.SOURCE: pb.ROLE_SOURCE, Role.TARGET: pb.ROLE_TARGET}


def obstacle(value: Obstacle) -> pb.Obstacle:
    return pb.Obstacle(reason=value.reason.value, message=value.message)


def node_report(agent: Agent) -> pb.NodeReport:
    facts, config = agent.node_facts(), agent.config
    return pb.NodeReport(
        node=config.node_name,
        address=config.node_ip,
        control_port=config.control_port,
        transfer_port=config.transfer_port,
        problems=map(obstacle, facts.problems),
        kernel=facts.kernel,
        architecture=facts.architecture,
        versions=dict(facts.versions),
        cpu_features=facts.cpu_features,
        dirty_tracking=facts.tracking.value,
        ip_pools=facts.ip_pools,
    )


def inspection(found: Inspection, facts: NodeFacts) -> pb.CheckSourceResponse:
    containers = [
        pb.ContainerFacts(
            name=container.name,
            id=container.id,
            memory_bytes=container.memory_bytes,
            files_bytes=container.files_bytes,
            processes=container.processes,
        )
        for container in found.containers
    ]
    return pb.CheckSourceResponse(
        obstacles=map(obstacle, found.obstacles),
        containers=containers,
        cpu_features=facts.cpu_features,
    )


def copy_progress(value: model.CopyProgress) -> pb.CopyProgress:
    return pb.CopyProgress(
        round=value.round,
        transferred_bytes=value.transferred_bytes,
        remaining_bytes=value.remaining_bytes,
        dirty_bytes_per_s=value.dirty_bytes_per_s,
        bandwidth_bytes_per_s=value.bandwidth_bytes_per_s,
        predicted_freeze_ms=value.predicted_freeze_ms,
        converged=value.converged,
        cpu_percent=value.cpu_percent,
    )


def outcome(value: model.Outcome) -> pb.SwitchResponse:
    failure = None
    if value.reason is not None:
        failure = pb.Obstacle(reason=value.reason.value, message=value.message)
    return pb.SwitchResponse(
        committed=value.committed,
        failure=failure,
        freeze_us=value.freeze_us,
        transferred_bytes=value.transferred_bytes,
        timings_us=dict(value.timings_us),
        missing_bytes=value.missing_bytes,
    )


def record(value: JournalSummary) -> pb.MigrationRecord:
    return pb.MigrationRecord(
        epoch=value.epoch,
        role=_ROLES[value.role],
        step=value.step,
        outcome=outcome(value.outcome) if value.outcome else None,
        missing_bytes=value.missing_bytes,
        lost=_failure(value.lost) if value.lost else None,
    )


def extents(values: Iterable[Extent]) -> pb.PagesResponse:
    return pb.PagesResponse(
        extents=(pb.Extent(vaddr=one.vaddr, length=one.length, data=one.data) for one in values)
    )


def _failure(error: GodwitError) -> pb.Obstacle:
    return pb.Obstacle(reason=error.reason.value, message=error.message)
