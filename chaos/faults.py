"""What breaks, done from outside.

Each fault is a context manager: when its block begins it is in force, the paused process goes
on within the block, and what lasts is undone at its end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from chaos.stage import NAMESPACE, POD, Stage

Fault = Callable[[Stage], contextlib.AbstractContextManager[None]]
_AGENT_PORTS = "9460-9461"
_API_PORT = "6443"
# Behind the translation of ClusterIPs (-100), so that everybody's way to the API server is met.
_TABLE = """
add table inet chaos
add chain inet chaos out { type filter hook output priority 10; }
add chain inet chaos in { type filter hook input priority 10; }
add chain inet chaos forward { type filter hook forward priority 10; }
"""
_CRIU_KILLS = 12


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


@contextlib.contextmanager
def _criu_at_work(stage: Stage) -> Iterator[None]:
    """CRIU dies after its gate was opened, in whatever it is doing then."""
    yield
    for _ in range(_CRIU_KILLS):
        for node in (stage.source, stage.target):
            _kill(stage, node, "^[^ ]*criu swrk")


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
    "kill CRIU": _criu_at_work,
    "cut the agents' link for 5 s": _dropped(_AGENT_PORTS, 5, lambda s: [s.source]),
    "API server away for 10 s": _dropped(_API_PORT, 10, _with_operator),
    "delete the migration": _at_once(lambda s: _delete(s, "podmigration", s.migration)),
    "delete the pod": _at_once(lambda s: _delete(s, "pod", POD)),
    "end the process": _at_once(lambda s: _kill(s, s.source, "^redis-server")),
}
