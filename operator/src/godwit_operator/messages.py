"""Parts of the agents' messages that follow from a migration. Pure."""

from __future__ import annotations

from godwit_api.migration import PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Pod


def reference(migration: PodMigration, *, epoch: int | None = None) -> pb.MigrationRef:
    return pb.MigrationRef(
        uid=migration.metadata.uid,
        epoch=migration.status.epoch if epoch is None else epoch,
        namespace=migration.metadata.namespace,
        name=migration.metadata.name,
    )


def pod_ref(migration: PodMigration, *, pod: Pod | None = None) -> pb.PodRef:
    """The source's pod; ``pod`` before the status knows it."""
    ips = migration.ips if pod is None else pod.ips
    return pb.PodRef(
        namespace=migration.metadata.namespace,
        name=migration.spec.pod_name,
        uid=migration.status.pod_uid if pod is None else pod.metadata.uid,
        ip="".join(ips[:1]),
        more_ips=ips[1:],
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
        ip="".join(migration.ips[:1]),
        more_ips=migration.ips[1:],
    )
