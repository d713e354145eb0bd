"""A pod for each reason that keeps one from moving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lab import workloads
from lab.cluster import LAB_IMAGE

Pod = dict[str, Any]
Change = Callable[[Pod], None]
# Of seccomp; it is on the pod's node alone.
PROFILE = "godwit/allow.json"


def _spec(**fields: Any) -> Change:
    return lambda pod: pod["spec"].update(fields)


def _container(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0].update(fields)


def _host_path(pod: Pod) -> None:
    pod["spec"]["volumes"] = [{"name": "v", "hostPath": {"path": "/etc"}}]
    pod["spec"]["containers"][0]["volumeMounts"] = [
        {"name": "v", "mountPath": "/host", "readOnly": True}
    ]


def _one_that_ended(pod: Pod) -> None:
    pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["containers"].append(_second("true"))


def _shared_ipc(pod: Pod) -> None:
    pod["spec"]["containers"].append(_second("sh", "-c", "ipcmk -M 4096 && exec sleep infinity"))


def _second(*command: str) -> Pod:
    return {
        "name": "second",
        "image": LAB_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
    }


# What the pod's own objects say. The kubelet answers its own postStart hook there.
SPECS: dict[str, Change] = {
    "WrongRuntimeClass": lambda pod: pod["spec"].pop("runtimeClassName"),
    "HostNetwork": _spec(hostNetwork=True),
    "HostPID": _spec(hostPID=True),
    "HostIPC": _spec(hostIPC=True),
    "SharedProcessNamespace": _spec(shareProcessNamespace=True),
    "PostStartHTTPHook": _container(
        lifecycle={
            "postStart": {"httpGet": {"host": "127.0.0.1", "port": 10248, "path": "/healthz"}}
        }
    ),
    "PreStopHTTPHook": _container(lifecycle={"preStop": {"httpGet": {"port": 6379}}}),
    "Terminal": _container(stdin=True, stdinOnce=True),
    "HostPort": _container(ports=[{"containerPort": 6379, "hostPort": 16379}]),
    "VolumeCannotFollow": _host_path,
    "PodFinalizers": lambda pod: pod["metadata"].update(finalizers=["godwit.io/test"]),
    "ContainerNotRunning": _one_that_ended,
    "SharedIPC": _shared_ipc,
    "ProfileMissing": _spec(
        securityContext={"seccompProfile": {"type": "Localhost", "localhostProfile": PROFILE}}
    ),
    "EphemeralContainers": lambda pod: None,  # added when it runs
    "ForeignProcess": lambda pod: None,  # started in it when it runs
}

# What never runs here; it is refused for that too.
PENDING: dict[str, Change] = {
    "PodNotRunning": _spec(nodeSelector={"no": "such"}),
    "UserNamespace": _spec(hostUsers=False, nodeSelector={"no": "such"}),
    "Device": _container(resources={"limits": {"example.com/thing": "1"}}),
    "HugePages": _container(
        resources={"limits": {"hugepages-2Mi": "2Mi", "memory": "64Mi", "cpu": "100m"}}
    ),
}

# What only the processes themselves tell: program, capabilities that it needs.
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SocketFamily": (
        "import socket\nkept = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)",
        ("NET_RAW",),
    ),
    "FileCannotFollow": (
        "import os\nkept = os.open('/tmp/first', os.O_RDWR | os.O_CREAT)\n"
        "os.link('/tmp/first', '/tmp/second'); os.unlink('/tmp/first')",
        (),
    ),
    "NestedNamespace": (
        "import os, time\n"
        "if not os.fork():\n"
        "    os.unshare(os.CLONE_NEWUTS)\n"
        "    open('/tmp/made', 'w').close(); time.sleep(10000)\n"
        "while not os.path.exists('/tmp/made'): time.sleep(0.01)",
        ("SYS_ADMIN",),
    ),
    "StoppedProcess": (
        "import os, signal\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "os.waitpid(child, os.WUNTRACED)",
        (),
    ),
    "UnsupportedMount": (
        "import subprocess\nsubprocess.run(['mount', '--bind', '/tmp', '/mnt'], check=True)",
        ("SYS_ADMIN",),
    ),
}
# In Perl, which every Debian has: the image's Python cannot make any system call.
CALLS: dict[str, str] = {
    # io_uring_setup(2)
    "IOUring": 'my $params = "\\0" x 120; syscall(425, 4, $params) >= 0 or die $!;',
    # ptrace(2), PTRACE_TRACEME
    "TracedProcess": (
        "use POSIX; my $child = fork;"
        " if (!$child) { syscall(101, 0, 0, 0, 0) == 0 or die $!; kill STOP => getpid(); exit }"
        " waitpid($child, WUNTRACED);"
    ),
}
_PERL_GOES_ON = 'open(my $ready, ">", "/tmp/ready"); sleep 100000 while 1'
_GOES_ON = "\nopen('/tmp/ready', 'w').close()\nimport time\ntime.sleep(100000)\n"


def redis(reason: str, namespace: str, node: str) -> Pod:
    """A Redis of :data:`SPECS` or :data:`PENDING`, named for its reason."""
    pod = workloads.bare_pod(reason.lower(), namespace, node=node)
    del pod["spec"]["containers"][0]["resources"]  # they are many for one node
    (SPECS.get(reason) or PENDING[reason])(pod)
    return pod


def program(reason: str, namespace: str, node: str) -> Pod:
    """A pod of :data:`PROGRAMS` or :data:`CALLS`; Ready when it holds what cannot move."""
    text, capabilities = PROGRAMS.get(reason, ("", ()))
    perl = CALLS.get(reason)
    command = ["perl", "-e", perl + _PERL_GOES_ON] if perl else ["python3", "-c", text + _GOES_ON]
    return workloads.pod(
        reason.lower(),
        namespace,
        LAB_IMAGE,
        node=node,
        imagePullPolicy="IfNotPresent",
        command=command,
        securityContext={"capabilities": {"add": list(capabilities)}},
        readinessProbe={"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1},
    )


def several(namespace: str, node: str) -> Pod:
    """Three reasons at once."""
    pod = workloads.bare_pod("several", namespace, node=node)
    for reason in ("HostIPC", "PreStopHTTPHook", "SharedProcessNamespace"):
        SPECS[reason](pod)
    return pod


def terminating(namespace: str, node: str) -> Pod:
    """Takes its time when it is deleted."""
    text = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)" + _GOES_ON
    pod = workloads.pod(
        "podterminating", namespace, LAB_IMAGE, node=node, command=["python3", "-c", text]
    )
    pod["spec"]["terminationGracePeriodSeconds"] = 300
    return pod


def large(name: str, namespace: str, node: str, requested: int) -> Pod:
    """A Redis that requests ``requested`` bytes of memory."""
    pod = workloads.bare_pod(name, namespace, node=node)
    pod["spec"]["containers"][0]["resources"]["requests"]["memory"] = str(requested)
    return pod


def daemon_set(namespace: str, node: str) -> Pod:
    """On one node."""
    spec = workloads.redis_pod_spec(node=None)
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "everywhere", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": {"app": "everywhere"}},
            "template": {
                "metadata": {"labels": {"app": "everywhere"}},
                "spec": {**spec, "nodeSelector": {"kubernetes.io/hostname": node}},
            },
        },
    }


def job(namespace: str, node: str) -> Pod:
    """A pod whose owner does not replace it under a name that is known."""
    spec = workloads.redis_pod_spec(node=node) | {"restartPolicy": "Never"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job", "namespace": namespace},
        "spec": {"template": {"metadata": {"labels": {"app": "job"}}, "spec": spec}},
    }


def static(namespace: str) -> Pod:
    """For the kubelet's own directory."""
    pod = workloads.bare_pod("static", namespace)
    pod["spec"].pop("affinity", None)
    return pod
