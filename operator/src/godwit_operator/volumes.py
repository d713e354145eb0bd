"""Which volumes of a pod follow it, which are copied because the migration names them. Pure.

A volume that lies on the network is mounted by the successor. One that is a directory of the node
(hostPath, also as a PersistentVolume without node affinity) is copied to the same path of the
target if ``spec.copyVolumes`` names it. A *local* PersistentVolume cannot follow: it and its
claim say which node it is on and cannot be changed, and replacing them under their names would
take the claim from the source before the commit.
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
_OUT = "use emptyDir, a network volume (ReadWriteMany), or a hostPath volume and spec.copyVolumes"


@dataclass(frozen=True)
class Storage:
    """What the pod's volumes refer to, by name."""

    claims: Mapping[str, Object] = field(default_factory=dict)  # of the pod's namespace
    volumes: Mapping[str, Object] = field(default_factory=dict)  # PersistentVolumes


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
        host_path = _host_path(volume, storage)
        if volume["name"] in copied and host_path is not None:
            path = posixpath.normpath(host_path["path"])
            found.append(CopiedVolume(name=volume["name"], path=path))
    return found


def affinities(pod: Pod, storage: Storage) -> list[tuple[str, Object]]:
    """(PersistentVolume, its required node affinity) of the volumes that the pod mounts."""
    found = []
    for claim in claim_names(pod):
        bound = _bound(claim, storage)
        required = ((bound or {}).get("spec", {}).get("nodeAffinity") or {}).get("required")
        if bound is not None and required:
            found.append((bound["metadata"]["name"], required))
    return found


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
            yield from _claim(name, volume[kind]["claimName"], storage, copied)
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
        for volume in other_pod.spec.volumes:
            path = posixpath.normpath((volume.get("hostPath") or {}).get("path") or "-")
            for one in directories:
                if _within(path, one.path) or _within(one.path, path):
                    key = f"{other_pod.metadata.namespace}/{other_pod.metadata.name}"
                    yield _refused(
                        f"Volume {one.name}: pod {key} mounts {path} of the same node, too, and "
                        "would not see what the moved pod writes"
                    )


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
    name: str, claim: str, storage: Storage, copied: Collection[str]
) -> Iterator[ObstacleView]:
    bound = _bound(claim, storage)
    if bound is None:
        yield _refused(f"Volume {name}: claim {claim} is bound to no PersistentVolume")
        return
    spec, volume = bound["spec"], bound["metadata"]["name"]
    label = f"Volume {name}: PersistentVolume {volume}"
    modes = storage.claims[claim]["spec"].get("accessModes", [])
    if "local" in spec or ("hostPath" in spec and spec.get("nodeAffinity")):
        yield _refused(
            f"{label} is bound to its node, and neither it nor claim {claim} can be changed; {_OUT}"
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


def _bound(claim: str, storage: Storage) -> Object | None:
    """The PersistentVolume of a claim."""
    name = (storage.claims.get(claim) or {}).get("spec", {}).get("volumeName", "")
    return storage.volumes.get(name)


def _host_path(volume: Object, storage: Storage) -> Object | None:
    if "persistentVolumeClaim" in volume:
        bound = _bound(volume["persistentVolumeClaim"]["claimName"], storage)
        volume = bound["spec"] if bound else {}
    found: Object | None = volume.get("hostPath")
    return found


def _kind(volume: Object) -> str:
    return next((key for key in volume if key != "name"), "emptyDir")


def _within(path: str, directory: str) -> bool:
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")


def _refused(message: str) -> ObstacleView:
    return ObstacleView(reason=Reason.VOLUME_CANNOT_FOLLOW, message=message)
