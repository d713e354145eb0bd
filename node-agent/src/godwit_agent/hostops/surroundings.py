"""What surrounds a pod's processes and cannot follow: mounts of their own, IPC objects that
several containers share, processes that somebody else has started in them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from godwit_agent.hostops import procs, sysvipc
from godwit_agent.hostops.model import Container, PodState
from godwit_api.reasons import Reason

Found = tuple[Reason, str]

_RUNTIME_OWN = ("/proc", "/sys", "/dev")  # what the runtime mounts and masks there is everywhere
_CRIU_DUMPS = frozenset(("tmpfs",))
# a probe or a command that ends by itself is no obstacle
_PATIENCE_S = 2.0
_LOOK_S = 0.2


def of_pod(pod: PodState) -> Iterator[Found]:
    living = [container for container in pod.containers if container.init_pid]
    if len(living) > 1 and (objects := _ipc_objects(living[0].init_pid)):
        yield (
            Reason.SHARED_IPC,
            f"the pod has System V IPC objects ({', '.join(objects)}), which can be restored for "
            "a pod of one container only",
        )
    for container, names in _foreign(living).items():
        yield (
            Reason.FOREIGN_PROCESS,
            f"container {container}: {', '.join(names)} was started by kubectl exec or the like: "
            "end it first",
        )


def mounts(container: Container) -> Iterator[Found]:
    """Mounts that the container has made itself (mountinfo: proc_pid_mountinfo(5))."""
    known = {"/", *(mount.destination.rstrip("/") for mount in container.mounts)}
    for line in procs.lines(container.init_pid, "mountinfo"):
        left, _, right = line.partition(" - ")
        point, kind = left.split(" ")[4], right.split(" ")[0]
        if point in known or kind in _CRIU_DUMPS:
            continue
        if not any(point == top or point.startswith(f"{top}/") for top in _RUNTIME_OWN):
            yield Reason.UNSUPPORTED_MOUNT, f"has mounted {point} ({kind}) itself: unmount it"


def _ipc_objects(pid: int) -> list[str]:
    """Kinds of System V objects in the IPC namespace of a process, with how many there are."""
    found = sysvipc.objects(pid, "shm", "sem", "msg")
    return [f"{len(lines)} {kind}" for kind, lines in found.items() if lines]


def _foreign(containers: list[Container]) -> dict[str, list[str]]:
    """Container to processes in it that are not of its tree, and stay for a while."""
    deadline = time.monotonic() + _PATIENCE_S
    while found := {one.name: names for one in containers if (names := _outside(one))}:
        if time.monotonic() > deadline:
            return found
        time.sleep(_LOOK_S)
    return {}


def _outside(container: Container) -> list[str]:
    own = set(procs.tree(container.init_pid))
    namespace = procs.namespace(container.init_pid, "pid")
    return [
        procs.read(pid, "comm").strip() or str(pid)
        for pid in procs.everyone()
        if pid not in own and namespace and procs.namespace(pid, "pid") == namespace
    ]
