"""Parts of the agents' messages that follow from a migration. Pure."""

from __future__ import annotations

from godwit_api.migration import PodMigration
from godwit_api.pb import agent_pb2 as pb


def reference(migration: PodMigration, *, epoch: int | None = None) -> pb.MigrationRef:
    return pb.MigrationRef(
        uid=migration.metadata.uid,
        epoch=migration.status.epoch if epoch is None else epoch,
        namespace=migration.metadata.namespace,
        name=migration.metadata.name,
    )


def pod_ref(migration: PodMigration, *, uid: str | None = None, ip: str | None = None) -> pb.PodRef:
    """The source's pod."""
    return pb.PodRef(
        namespace=migration.metadata.namespace,
        name=migration.spec.pod_name,
        uid=migration.status.pod_uid if uid is None else uid,
        ip=migration.status.pod_ip if ip is None else ip,
    )


def copied_volumes(migration: PodMigration) -> list[pb.CopiedVolume]:
    """Of the present attempt: on the way back to the source node they are there already."""
    status = migration.status
    if status.target_node == status.source_node:
        return []
    return [pb.CopiedVolume(name=one.name, path=one.path) for one in status.handover.volumes]


def successor_ref(migration: PodMigration) -> pb.PodRef:
    return pb.PodRef(
        namespace=migration.metadata.namespace,
        name=migration.status.successor_name,
        uid=migration.status.successor_uid,
        ip=migration.status.pod_ip,
    )
