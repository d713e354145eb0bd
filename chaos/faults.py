"""What breaks, done from outside.

Each fault is a context manager: when its block begins it is in force, the paused process goes
on within the block, and what lasts is undone at its end.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator

from chaos.stage import NAMESPACE, POD, Stage
from lab.cluster import SYSTEM_NAMESPACE

Fault = Callable[[Stage], contextlib.AbstractContextManager[None]]
_AGENT_PORTS = "9460-9461"
_API_PORT = "6443"
_ENDS_S = 240.0
# Behind the translation of ClusterIPs (-100), so that everybody's way to the API server is met.
_TABLE = """
add table inet chaos
add chain inet chaos out { type filter hook output priority 10; }
add chain inet chaos in { type filter hook input priority 10; }
add chain inet chaos forward { type filter hook forward priority 10; }
"""
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
# No pod is admitted while this is there: its server does not exist.
_BROKEN_WEBHOOK = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "ValidatingWebhookConfiguration",
    "metadata": {"name": "chaos"},
    "webhooks": [
        {
            "name": "nobody.chaos.godwit.io",
            "clientConfig": {"service": {"name": "nobody", "namespace": NAMESPACE}},
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "timeoutSeconds": 1,
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
            "rules": [
                {
                    "apiGroups": [""],
                    "apiVersions": ["v1"],
                    "resources": ["pods"],
                    "operations": ["CREATE"],
                }
            ],
        }
    ],
}


def _kill(stage: Stage, node: str, pattern: str) -> None:
    stage.cluster.node_exec(node, "pkill", "-9", "-f", pattern, check=False)


def _at_once(work: Callable[[Stage], object]) -> Fault:
    """A fault that is over when it has been done."""

    @contextlib.contextmanager
    def fault(stage: Stage) -> Iterator[None]:
        work(stage)
        yield

    return fault


def _dropped(ports: str, seconds: float, nodes: Callable[[Stage], list[str]]) -> Fault:
    """Packets to these TCP ports are dropped on some nodes for a while."""

    @contextlib.contextmanager
    def fault(stage: Stage) -> Iterator[None]:
        rules = "".join(
            f"add rule inet chaos {chain} tcp dport {ports} drop\n"
            for chain in ("out", "in", "forward")
        )
        where = list(dict.fromkeys(nodes(stage)))
        end = time.monotonic() + seconds
        try:
            for node in where:
                script = f"nft -f - <<'END'\n{_TABLE}{rules}END\n"
                stage.cluster.node_exec(node, "sh", "-c", script)
            yield
            time.sleep(max(end - time.monotonic(), 0.0))
        finally:
            for node in where:
                stage.cluster.node_exec(node, "nft", "delete", "table", "inet", "chaos")

    return fault


# CRIU itself: what waits at a gate has the same words, and is the hook.
_STRIKE = """
echo ready
end=$(($(date +%s) + 20))
while [ $(date +%s) -lt $end ]; do
  for p in $(pgrep -f "$1"); do
    case $(readlink /proc/$p/exe) in */criu/criu) kill -9 $p && echo struck && exit;; esac
  done
  sleep 0.002
done
"""


def _at_work(pattern: str, node: Callable[[Stage], str]) -> Fault:
    """A process of CRIU dies as soon as it works, which it does when the paused one goes on."""

    @contextlib.contextmanager
    def fault(stage: Stage) -> Iterator[None]:
        words = ("node", "exec", node(stage), "--", "sh", "-c", _STRIKE, "strike", pattern)
        argv = stage.cluster.argv(*words)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as hunter:
            assert hunter.stdout
            hunter.stdout.readline()  # it looks already when the paused process goes on
            yield
            stage.struck = "struck" in hunter.stdout.read()

    return fault


def _criu(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """In the dump or in the restore, whichever comes next."""
    where = _target if stage.boundary == "restore" else _source
    return _at_work("^[^ ]*criu swrk", where)(stage)


_HUNT = """
n=0
until pkill -9 -f '^[^ ]*criu swrk'; do n=$((n+1)); [ $n -lt 3000 ] || exit 0; sleep 0.01; done
"""


@contextlib.contextmanager
def criu_hunted(stage: Stage) -> Iterator[None]:
    """The next CRIU on the source's node dies as soon as it is seen, within 30 s."""
    stage.cluster.node_exec(stage.source, "sh", "-c", _HUNT, check=False)
    yield


def _restart(node: Callable[[Stage], str], service: str) -> Fault:
    return _at_once(lambda stage: stage.cluster.run("restart", node(stage), service))


@contextlib.contextmanager
def _link_cut(stage: Stage) -> Iterator[None]:
    """No packet between the two nodes' agents, until the migration has ended."""
    addresses = stage.node_address(stage.target)
    rules = (
        f"add rule inet chaos out ip daddr {addresses} tcp dport {_AGENT_PORTS} drop\n"
        f"add rule inet chaos out ip daddr {addresses} tcp sport {_AGENT_PORTS} drop\n"
    )
    stage.cluster.node_exec(stage.source, "sh", "-c", f"nft -f - <<'END'\n{_TABLE}{rules}END\n")
    try:
        yield
        stage.final(_ENDS_S)
    finally:
        stage.cluster.node_exec(stage.source, "nft", "delete", "table", "inet", "chaos")


@contextlib.contextmanager
def _no_pods(stage: Stage) -> Iterator[None]:
    end = time.monotonic() + 20
    stage.cluster.apply(_BROKEN_WEBHOOK)
    try:
        yield
        time.sleep(max(end - time.monotonic(), 0.0))
    finally:
        stage.cluster.kubectl("delete", "validatingwebhookconfiguration", "chaos")


_FILL = """
for d in /run/godwit/store/*; do
  mount -o remount,size=$(($(df -k --output=used $d | tail -n 1) + ${1:-0}))k $d && echo full
done
"""


def _fill_store(stage: Stage) -> None:
    """The target's store has no byte left: its limit is what it holds."""
    said = stage.cluster.node_exec(stage.target, "sh", "-c", _FILL, check=False)
    stage.struck = "full" in said


@contextlib.contextmanager
def _target_gone(stage: Stage) -> Iterator[None]:
    stage.cluster.run("crash", stage.target)
    try:
        yield
        stage.final(_ENDS_S)
    finally:
        stage.boot(stage.target)


@contextlib.contextmanager
def _source_gone(stage: Stage) -> Iterator[None]:
    """For good, says the administrator a little later; then it is there again, empty."""
    stage.cluster.run("crash", stage.source)
    try:
        yield
        stage.cluster.kubectl("taint", "node", stage.source, f"{_OUT_OF_SERVICE}=off:NoExecute")
        stage.final(_ENDS_S)
    finally:
        stage.boot(stage.source)
        stage.cluster.kubectl("taint", "node", stage.source, f"{_OUT_OF_SERVICE}-")


@contextlib.contextmanager
def _two_operators(stage: Stage) -> Iterator[None]:
    """The old one stands still with what it knows while a new one takes over; then both run."""
    here, pattern = stage.operator_node(), "python3 -m godwit_operator"
    scale = ("scale", "deployment/godwit-operator", "-n", SYSTEM_NAMESPACE)
    stage.cluster.node_exec(here, "pkill", "-STOP", "-f", pattern)
    try:
        stage.cluster.kubectl(*scale, "--replicas=2")
        stage.await_operators(2)
        yield
        time.sleep(3)
        # of several it is the one that stands still
        stage.cluster.node_exec(here, "pkill", "-CONT", "-f", pattern)
        stage.final(_ENDS_S)
    finally:
        stage.cluster.node_exec(here, "pkill", "-CONT", "-f", pattern, check=False)
        stage.cluster.kubectl(*scale, "--replicas=1")
        stage.await_operators(1)


def _delete(stage: Stage, kind: str, name: str) -> None:
    stage.cluster.kubectl("delete", kind, name, "-n", NAMESPACE, "--wait=false")


def _source(stage: Stage) -> str:
    return stage.source


def _target(stage: Stage) -> str:
    return stage.target


def _with_operator(stage: Stage) -> list[str]:
    return [stage.source, stage.target, stage.operator_node()]


FAULTS: dict[str, Fault] = {
    "kill operator": _at_once(lambda s: _kill(s, s.operator_node(), "python3 -m godwit_operator")),
    "kill source agent": _at_once(lambda s: _kill(s, s.source, "python3 -m godwit_agent$")),
    "kill target agent": _at_once(lambda s: _kill(s, s.target, "python3 -m godwit_agent$")),
    "restart kubelet of the source": _restart(_source, "kubelet"),
    "restart kubelet of the target": _restart(_target, "kubelet"),
    "restart containerd of the source": _restart(_source, "containerd"),
    "restart containerd of the target": _restart(_target, "containerd"),
    "kill CRIU": _criu,
    "kill the page daemon": _at_work("^[^ ]*criu lazy-pages", _target),
    "cut the agents' link for 5 s": _dropped(_AGENT_PORTS, 5, lambda s: [s.source]),
    "cut the agents' link for good": _link_cut,
    "API server away for 10 s": _dropped(_API_PORT, 10, _with_operator),
    "no pod can be created for 20 s": _no_pods,
    "fill the target's store": _at_once(_fill_store),
    "target node gone": _target_gone,
    "source node gone": _source_gone,
    "an old operator beside the new one": _two_operators,
    "delete the migration": _at_once(lambda s: _delete(s, "podmigration", s.migration)),
    "delete the pod": _at_once(lambda s: _delete(s, "pod", POD)),
    "end the process": _at_once(lambda s: _kill(s, s.source, "^redis-server")),
}
