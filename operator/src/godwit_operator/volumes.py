"""Which volumes of a pod follow it, which are copied because the migration names them. Pure.

A volume that lies on the network is mounted by the successor. One that is a directory of the node
(hostPath, or a PersistentVolume of one) is copied to the same path of the target if
``spec.copyVolumes`` names it. A PersistentVolume that names its node (*local* ones do) follows
where the API server lets that be changed. Replacing it and its claim under their names would take
the claim from the source before the commit.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from godwit_api.migration import CopiedVolume, ObstacleView
from godwit_api.pods import Pod
from godwit_api.reasons import Reason

Object = Mapping[str, Any]
_FOLLOWING = frozenset({"emptyDir", "configMap", "secret", "projected", "downwardAPI", "nfs"})
_NETWORK_MODES = frozenset({"ReadWriteMany", "ReadOnlyMany"})
_NETWORK_VOLUMES = frozenset(
    {"nfs", "csi", "cephfs", "azureFile", "glusterfs", "quobyte", "portworxVolume"}
)
"""Kinds of PersistentVolumes that two nodes may mount at once if their access modes say so."""
_DIRECTORY_TYPES = frozenset({"", "Directory", "DirectoryOrCreate"})
HOSTNAME = "kubernetes.io/hostname"
_OUT = "use emptyDir, a network volume (ReadWriteMany), or a hostPath volume and spec.copyVolumes"


@dataclass(frozen=True)
class Storage:
    """What the pod's volumes refer to, by name."""

    claims: Mapping[str, Object] = field(default_factory=dict)  # of the pod's namespace
    volumes: Mapping[str, Object] = field(default_factory=dict)  # PersistentVolumes
    fixed: Mapping[str, str] = field(default_factory=dict)  # those that keep their node, and why


def claim_names(pod: Pod) -> list[str]:
    """Of the claims that the pod mounts."""
    kind = "persistentVolumeClaim"
    return [volume[kind]["claimName"] for volume in pod.spec.volumes if kind in volume]


def volume_obstacles(
    pod: Pod, storage: Storage, copied: Collection[str], others: Iterable[Pod] = ()
) -> list[ObstacleView]:
    """Everything about volumes that keeps the pod from moving; ``copied``: what the migration
    names; ``others``: further pods of the node."""
    return [
        *_obstacles(pod, storage, copied),
        *_copy_obstacles(pod, storage, copied, others),
    ]


def copied_volumes(pod: Pod, storage: Storage, copied: Collection[str]) -> list[CopiedVolume]:
    """The node's directories among the volumes that the migration names."""
    found = []
    for volume in pod.spec.volumes:
        bound = _bound_of(volume, storage)
        spec = bound["spec"] if bound is not None else volume
        directory = spec.get("hostPath") or spec.get("local")
        if volume["name"] not in copied or directory is None:
            continue
        path = posixpath.normpath(directory["path"])
        if bound is not None and names_its_node(bound):
            pv, home = bound["metadata"]["name"], (named_nodes(bound) or [""])[0]
            found.append(
                CopiedVolume(name=volume["name"], path=path, persistent_volume=pv, home=home)
            )
        else:
            found.append(CopiedVolume(name=volume["name"], path=path))
    return found


def affinities(pod: Pod, storage: Storage) -> list[tuple[str, Object]]:
    """(PersistentVolume, its required node affinity) of the volumes that the pod mounts, but for
    those that are a directory of one node: their affinity goes along, or they are refused."""
    found = []
    for volume in pod.spec.volumes:
        bound = _bound_of(volume, storage)
        if bound is None or names_its_node(bound):
            continue
        required = (bound["spec"].get("nodeAffinity") or {}).get("required")
        if required:
            found.append((bound["metadata"]["name"], required))
    return found


def names_its_node(volume: Object) -> bool:
    """A PersistentVolume that is a directory, and says of which node."""
    spec = volume["spec"]
    return "local" in spec or ("hostPath" in spec and bool(spec.get("nodeAffinity")))


def named_nodes(volume: Object) -> list[str] | None:
    """What a PersistentVolume's node affinity names (``kubernetes.io/hostname``); None if it says
    more than that, or something else."""
    required = (volume["spec"].get("nodeAffinity") or {}).get("required") or {}
    match required.get("nodeSelectorTerms"):
        case [{"matchExpressions": [{"key": key, "operator": "In", "values": names}], **more}]:
            return list(names) if key == HOSTNAME and not any(more.values()) else None
    return None


def affinity_to(*names: str) -> Object:
    """The ``nodeAffinity`` of a PersistentVolume that is on these nodes."""
    expression = {"key": HOSTNAME, "operator": "In", "values": list(names)}
    return {"required": {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}}


def _obstacles(pod: Pod, storage: Storage, copied: Collection[str]) -> Iterator[ObstacleView]:
    for volume in pod.spec.volumes:
        name, kind = volume["name"], _kind(volume)
        if kind == "emptyDir":
            if (volume.get(kind) or {}).get("medium", "").startswith("HugePages"):
                message = f"Volume {name}: emptyDir of huge pages"
                yield ObstacleView(reason=Reason.HUGE_PAGES, message=message)
        elif kind == "hostPath":
            yield from _directory(name, volume[kind], copied)
        elif kind == "persistentVolumeClaim":
            yield from _claim(name, volume[kind]["claimName"], pod, storage, copied)
        elif kind not in _FOLLOWING:
            yield _refused(f"Volume {name} ({kind}) cannot follow to a node; {_OUT}")


def _copy_obstacles(
    pod: Pod, storage: Storage, copied: Collection[str], others: Iterable[Pod]
) -> Iterator[ObstacleView]:
    names = {volume["name"] for volume in pod.spec.volumes}
    directories = copied_volumes(pod, storage, copied)
    for name in sorted(set(copied) - names):
        yield _refused(f"spec.copyVolumes names {name}, which is no volume of the pod")
    for volume in pod.spec.volumes:
        name, kind = volume["name"], _kind(volume)
        if name in copied and kind in _FOLLOWING - {"emptyDir"}:  # which is copied in any case
            yield _refused(
                f"spec.copyVolumes names {name} ({kind}), which follows without being copied"
            )
    for one in directories:
        if one.path == "/":
            yield _refused(f"Volume {one.name} is the whole file system of its node")
        for other in directories:
            if other.name != one.name and _within(other.path, one.path):
                yield _refused(f"Volume {other.name} ({other.path}) is part of volume {one.name}")
    for other_pod in others:
        if other_pod.metadata.uid == pod.metadata.uid or other_pod.finished:
            continue
        key = f"{other_pod.metadata.namespace}/{other_pod.metadata.name}"
        for volume in other_pod.spec.volumes:
            path = posixpath.normpath((volume.get("hostPath") or {}).get("path") or "-")
            for one in directories:
                if _within(path, one.path) or _within(one.path, path):
                    yield _shared(one.name, key, f"{path} of the same node")
            claim = _claim_name(volume)
            if claim is None or other_pod.metadata.namespace != pod.metadata.namespace:
                continue
            for own in pod.spec.volumes:
                if own["name"] in copied and _claim_name(own) == claim:
                    yield _shared(own["name"], key, f"claim {claim}")


def _directory(name: str, host_path: Object, copied: Collection[str]) -> Iterator[ObstacleView]:
    kind = host_path.get("type") or ""
    if kind not in _DIRECTORY_TYPES:
        yield _refused(
            f"Volume {name} (hostPath of type {kind}) is no directory that can be copied"
        )
    elif name not in copied:
        yield _refused(
            f"Volume {name} (hostPath) is a directory of its node; name it in spec.copyVolumes to "
            "have its content copied to the same path of the target"
        )


def _claim(
    name: str, claim: str, pod: Pod, storage: Storage, copied: Collection[str]
) -> Iterator[ObstacleView]:
    bound = _bound(claim, storage)
    if bound is None:
        yield _refused(f"Volume {name}: claim {claim} is bound to no PersistentVolume")
        return
    spec, volume = bound["spec"], bound["metadata"]["name"]
    label = f"Volume {name}: PersistentVolume {volume}"
    modes = storage.claims[claim]["spec"].get("accessModes", [])
    if names_its_node(bound):
        why = _stays(bound, pod, storage.fixed.get(volume, ""))
        if why:
            yield _refused(f"{label} is bound to its node: {why}; {_OUT}")
        elif name not in copied:
            yield _refused(
                f"{label} is a directory of its node; name {name} in spec.copyVolumes to have its "
                "content copied to the same path of the target, and its node affinity changed"
            )
    elif "hostPath" in spec:
        yield from _directory(name, spec["hostPath"], copied)
    elif not _NETWORK_VOLUMES.intersection(spec):
        yield _refused(f"{label} is of a kind that cannot follow to a node; {_OUT}")
    elif not _NETWORK_MODES.intersection(modes):
        yield _refused(
            f"{label}: claim {claim} has access modes {', '.join(modes) or '(none)'}; "
            "only ReadWriteMany and ReadOnlyMany can be mounted on two nodes at once"
        )


def _stays(volume: Object, pod: Pod, fixed: str) -> str:
    """Why a PersistentVolume that names its node cannot be told another one; "" if it can."""
    if volume["spec"].get("volumeMode") == "Block":
        return "raw blocks are not copied"
    if len(named_nodes(volume) or []) != 1:
        return f"its node affinity is not just one name of a node ({HOSTNAME})"
    if pod.controller is not None and pod.controller.kind == "ReplicaSet":
        return "a ReplicaSet may start another pod on it at any time"
    return fixed


def _bound(claim: str, storage: Storage) -> Object | None:
    """The PersistentVolume of a claim."""
    name = (storage.claims.get(claim) or {}).get("spec", {}).get("volumeName", "")
    return storage.volumes.get(name)


def _bound_of(volume: Object, storage: Storage) -> Object | None:
    claim = _claim_name(volume)
    return None if claim is None else _bound(claim, storage)


def _claim_name(volume: Object) -> str | None:
    found: str | None = (volume.get("persistentVolumeClaim") or {}).get("claimName")
    return found


def _shared(name: str, pod: str, what: str) -> ObstacleView:
    return _refused(
        f"Volume {name}: pod {pod} mounts {what}, too, and would not see what the moved pod writes"
    )


def _kind(volume: Object) -> str:
    return next((key for key in volume if key != "name"), "emptyDir")


def _within(path: str, directory: str) -> bool:
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")


def _refused(message: str) -> ObstacleView:
    return ObstacleView(reason=Reason.VOLUME_CANNOT_FOLLOW, message=message)
