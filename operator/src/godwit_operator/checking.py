"""What keeps a pod from moving, as far as its objects tell. Pure.

Everything is collected, nothing stops at the first finding: the person who
reads it shall mend all of it at once. What the processes hold is the source
agent's to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from godwit_api.migration import ObstacleView
from godwit_api.pods import Container, Pod
from godwit_api.reasons import Reason

RUNTIME_CLASS = "godwit"
MIRROR_ANNOTATION = "kubernetes.io/config.mirror"
OWNER_KINDS = frozenset({"StatefulSet", "ReplicaSet"})
_PLAIN_RESOURCES = frozenset({"cpu", "memory", "ephemeral-storage"})


def obstacle(reason: Reason, message: str) -> ObstacleView:
    return ObstacleView(reason=reason, message=message)


def pod_obstacles(pod: Pod) -> list[ObstacleView]:
    """Everything about the pod's own object that keeps it from moving, but for its volumes
    (``volumes.volume_obstacles``)."""
    return [
        *_state(pod),
        *_owner(pod),
        *_host(pod),
        *_containers(pod),
    ]


def _state(pod: Pod) -> Iterator[ObstacleView]:
    name = pod.metadata.name
    if pod.terminating:
        yield obstacle(Reason.POD_TERMINATING, f"Pod {name} is being deleted")
    if pod.status.phase != "Running":
        phase = pod.status.phase or "unknown"
        yield obstacle(Reason.POD_NOT_RUNNING, f"Pod {name} is {phase}; only running pods move")
    elif not pod.status.pod_ip:
        yield obstacle(Reason.POD_NOT_RUNNING, f"Pod {name} has no address yet")
    if pod.spec.runtime_class_name != RUNTIME_CLASS:
        yield obstacle(
            Reason.WRONG_RUNTIME_CLASS,
            f"Pod {name} has runtimeClassName {pod.spec.runtime_class_name or '(none)'}; "
            f"set it to {RUNTIME_CLASS!r} in the pod template",
        )
    if pod.metadata.finalizers:
        yield obstacle(
            Reason.POD_FINALIZERS,
            f"Pod {name} has finalizers ({', '.join(pod.metadata.finalizers)}), "
            "so it cannot be replaced at once",
        )


def _owner(pod: Pod) -> Iterator[ObstacleView]:
    owner = pod.controller
    if MIRROR_ANNOTATION in pod.metadata.annotations or (owner and owner.kind == "Node"):
        yield obstacle(Reason.STATIC_POD, "Static pods belong to the kubelet of their node")
    elif owner is not None and owner.kind == "DaemonSet":
        yield obstacle(Reason.DAEMON_SET_POD, f"DaemonSet {owner.name} wants this pod on its node")
    elif owner is not None and owner.kind not in OWNER_KINDS:
        yield obstacle(
            Reason.UNSUPPORTED_OWNER,
            f"Pods of {owner.kind} {owner.name} cannot move; pods of StatefulSets, of "
            "Deployments and without an owner can",
        )


def _host(pod: Pod) -> Iterator[ObstacleView]:
    spec = pod.spec
    if spec.host_network:
        yield obstacle(Reason.HOST_NETWORK, "hostNetwork: the node's addresses cannot move")
    if spec.host_pid:
        yield obstacle(Reason.HOST_PID, "hostPID: the node's process IDs cannot move")
    if spec.host_ipc:
        yield obstacle(Reason.HOST_IPC, "hostIPC: the node's IPC objects cannot move")
    if spec.share_process_namespace:
        yield obstacle(Reason.SHARED_PROCESS_NAMESPACE, "shareProcessNamespace is not supported")
    if spec.host_users is False:
        yield obstacle(Reason.USER_NAMESPACE, "hostUsers: false (user namespaces) is not supported")
    if spec.resource_claims:
        yield obstacle(Reason.DEVICE, "resourceClaims: devices cannot move")


def _containers(pod: Pod) -> Iterator[ObstacleView]:
    spec = pod.spec
    resting = {
        status.name
        for status in (*pod.status.init_container_statuses, *pod.status.container_statuses)
        if status.state.running is None
    }
    ended = [container.name for container in spec.lasting if container.name in resting]
    if pod.status.phase == "Running" and ended:
        yield obstacle(
            Reason.CONTAINER_NOT_RUNNING,
            f"Containers that do not run ({', '.join(ended)}) would start again on the target; "
            "wait until they run, or remove them from the pod template",
        )
    if spec.ephemeral_containers:
        yield obstacle(
            Reason.EPHEMERAL_CONTAINERS, "Ephemeral containers (kubectl debug) cannot move"
        )
    for container in spec.lasting:
        yield from _container(container)
        yield from _input(container, last=container in spec.containers[-1:])


def _input(container: Container, *, last: bool) -> Iterator[ObstacleView]:
    """The runtime takes a terminal from the process itself, which comes with the switch: the
    kubelet waits for that before it turns to the next container."""
    if container.tty and not last:
        yield obstacle(
            Reason.TERMINAL,
            f"Container {container.name}: tty, but not the last container of the pod: those after "
            "it would not be started on the target; make it the last one",
        )
    if container.stdin_once and not container.tty:
        yield obstacle(
            Reason.TERMINAL,
            f"Container {container.name}: stdinOnce: whether its input was closed does not "
            "follow; leave stdinOnce out, or use tty",
        )


def _container(container: Container) -> Iterator[ObstacleView]:
    name = container.name
    for port in container.ports:
        if port.host_port:
            yield obstacle(
                Reason.HOST_PORT, f"Container {name}: hostPort {port.host_port} is the node's"
            )
    start = container.lifecycle.post_start
    if start is not None and (start.http_get is not None or start.tcp_socket is not None):
        yield obstacle(
            Reason.POST_START_HTTP_HOOK,
            f"Container {name}: the target's kubelet would call the postStart hook again; exec "
            "hooks are held back, httpGet and tcpSocket hooks cannot be",
        )
    stop = container.lifecycle.pre_stop
    if stop is not None and (stop.http_get is not None or stop.tcp_socket is not None):
        yield obstacle(
            Reason.PRE_STOP_HTTP_HOOK,
            f"Container {name}: the kubelet would call the preStop hook of the running "
            "process; exec hooks are held back, httpGet and tcpSocket hooks cannot be",
        )
    if container.volume_devices:
        yield obstacle(Reason.VOLUME_CANNOT_FOLLOW, f"Container {name}: volumeDevices (raw blocks)")
    for resource in sorted({*container.resources.requests, *container.resources.limits}):
        if resource.startswith("hugepages-"):
            yield obstacle(Reason.HUGE_PAGES, f"Container {name}: {resource}")
        elif resource not in _PLAIN_RESOURCES:
            yield obstacle(Reason.DEVICE, f"Container {name}: {resource} is bound to its node")
    if container.resources.claims:
        yield obstacle(Reason.DEVICE, f"Container {name}: resource claims are bound to the node")


def distinct(obstacles: list[ObstacleView]) -> list[ObstacleView]:
    """Without repetitions of what several parties have found; order kept."""
    return list(dict.fromkeys(obstacles))
