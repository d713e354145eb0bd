"""PersistentVolumes that name their node: the name goes along with the pod.

From before the successor is let go until the migration has decided where the pod stays, such a
volume names both nodes: the kubelet mounts none whose node affinity excludes its node. All that
time the admission rule holds back every other pod that could use it. Only Kubernetes with the
feature gate ``MutablePVNodeAffinity`` lets the affinity be changed; elsewhere Checking has refused
such a volume (``storage.storage_of`` asks).
"""

from __future__ import annotations

from godwit_api.errors import Retryable
from godwit_api.migration import CopiedVolume, PodMigration
from godwit_api.reasons import Reason
from godwit_operator.kube import NODES, VOLUMES, KubeApi, Object, find
from godwit_operator.volumes import HOSTNAME, affinity_to, named_nodes


async def open_to_target(api: KubeApi, migration: PodMigration) -> None:
    """The volumes may be mounted on the source and on the present target."""
    volumes = _local(migration)
    if not volumes:
        return
    target = migration.status.target_node
    node = await find(api, NODES, None, target)
    label = (node or {}).get("metadata", {}).get("labels", {}).get(HOSTNAME)
    if not label:
        message = f"Node {target} has no label {HOSTNAME}"
        raise Retryable(Reason.TARGET_UNSCHEDULABLE, message, delay_seconds=1.0)
    for volume in volumes:
        body = await api.get(VOLUMES, None, volume.persistent_volume)
        await _name(api, body, list(dict.fromkeys((volume.home, label))))


async def settle(api: KubeApi, migration: PodMigration) -> None:
    """They are where the pod is, and nowhere else."""
    for volume in _local(migration):
        body = await find(api, VOLUMES, None, volume.persistent_volume)
        names = named_nodes(body) if body is not None else None
        if body is None or names is None:
            continue  # deleted, or somebody has given it another affinity
        elsewhere = [name for name in names if name != volume.home]
        moved = migration.status.handover.committed and elsewhere
        await _name(api, body, elsewhere if moved else [volume.home])


def _local(migration: PodMigration) -> list[CopiedVolume]:
    return [one for one in migration.status.handover.volumes if one.persistent_volume]


async def _name(api: KubeApi, volume: Object, names: list[str]) -> None:
    if named_nodes(volume) == names:
        return
    meta = volume["metadata"]
    version = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
    body = {"metadata": version, "spec": {"nodeAffinity": affinity_to(*names)}}
    await api.patch(VOLUMES, None, meta["name"], body)
