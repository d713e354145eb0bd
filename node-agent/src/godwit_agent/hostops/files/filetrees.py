"""Which directories of a pod are copied: writable layers, emptyDirs, /dev/shm, and the node's
directories that the migration names.

All else either comes with the image or is mounted by the kubelet again
(secrets, config maps, network volumes).
"""

from __future__ import annotations

from godwit_agent.hostops.filerecords import LOG, UPPER
from godwit_agent.hostops.files import containerlog
from godwit_agent.hostops.model import Container, PodState

_EMPTY_DIR = "/volumes/kubernetes.io~empty-dir/"
_SUB_PATHS = "/volume-subpaths/"
_SHM = "/dev/shm"  # noqa: S108 - a mount destination, not a file of ours


def copied_mounts(container: Container) -> dict[str, str]:
    """Mount destination to host directory; a volume of which only a part is mounted by name."""
    found = {}
    for mount in container.mounts:
        if mount.kind != "bind":
            continue
        if _EMPTY_DIR in mount.source or mount.destination == _SHM:
            found[mount.destination] = mount.source
        elif _SUB_PATHS in mount.source:
            # <pod>/volume-subpaths/<volume>/<container>/<n>: the kubelet's bind of a subPath.
            # There is no such directory unless the volume is an emptyDir.
            pod, _, rest = mount.source.partition(_SUB_PATHS)
            volume = rest.partition("/")[0]
            found[f"subPath of {volume}"] = f"{pod}{_EMPTY_DIR}{volume}"
    return found


def source_trees(pod: PodState) -> list[tuple[str, str, str]]:
    """(container, tree, host directory); what containers share is listed once. The node's
    directories come with the first container."""
    found: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for container in pod.containers:
        if container.upper_dir:
            found.append((container.name, UPPER, container.upper_dir))
        for destination, directory in copied_mounts(container).items():
            if directory not in seen:
                seen.add(directory)
                found.append((container.name, destination, directory))
    first = pod.containers[0].name
    return found + [(first, volume_tree(volume.name), volume.path) for volume in pod.volumes]


def volume_tree(name: str) -> str:
    """The tree that is a directory of the node. Mount destinations begin with a slash."""
    return f"volume {name}"


def target_trees(pod: PodState, container: Container) -> dict[str, str]:
    """Tree to host directory. The writable layer is written through the mounted root: changing
    an overlay's upper directory behind its back is undefined (overlayfs.rst)."""
    return {
        UPPER: container.rootfs,
        LOG: containerlog.directory_of(pod, container.name),
        **copied_mounts(container),
    }
