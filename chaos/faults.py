"""What breaks. Each fault is done from outside, and undone before it returns where it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable

from chaos.stage import NAMESPACE, POD, Stage

_AGENT_PORTS = "9460-9461"
_API_PORT = "6443"


def _kill(stage: Stage, node: str, pattern: str) -> None:
    stage.cluster.node_exec(node, "pkill", "-9", "-f", pattern, check=False)


def _cut(stage: Stage, node: str, rule: str, seconds: float) -> None:
    """An nft rule on a node, for a while."""
    table = (
        "add table inet chaos\n"
        "add chain inet chaos out { type filter hook output priority -300; }\n"
        "add chain inet chaos in { type filter hook input priority -300; }\n"
        f"add rule inet chaos out {rule}\nadd rule inet chaos in {rule}\n"
    )
    script = "nft -f - <<'END'\n" + table + f"END\nsleep {seconds:g}\nnft delete table inet chaos\n"
    stage.cluster.node_exec(node, "sh", "-c", script)


def _restart(stage: Stage, node: str, service: str) -> None:
    stage.cluster.run("restart", node, service)


def _api_away(stage: Stage) -> None:
    for node in dict.fromkeys((stage.source, stage.target, stage.operator_node())):
        script = (
            "nft -f - <<'END'\nadd table inet chaos\n"
            "add chain inet chaos out { type filter hook output priority -300; }\n"
            "add chain inet chaos forward { type filter hook forward priority 300; }\n"
            f"add rule inet chaos out tcp dport {_API_PORT} drop\n"
            f"add rule inet chaos forward tcp dport {_API_PORT} drop\nEND\n"
            "(sleep 10; nft delete table inet chaos) >/dev/null 2>&1 &\n"
        )
        stage.cluster.node_exec(node, "sh", "-c", script)
    time.sleep(11)


def _delete(stage: Stage, kind: str, name: str) -> None:
    stage.cluster.kubectl("delete", kind, name, "-n", NAMESPACE, "--wait=false")


def _kill_criu(stage: Stage) -> None:
    for node in (stage.source, stage.target):
        _kill(stage, node, "^[^ ]*criu ")


FAULTS: dict[str, Callable[[Stage], None]] = {
    "kill operator": lambda s: _kill(s, s.operator_node(), "python3 -m godwit_operator"),
    "kill source agent": lambda s: _kill(s, s.source, "python3 -m godwit_agent$"),
    "kill target agent": lambda s: _kill(s, s.target, "python3 -m godwit_agent$"),
    "restart kubelet of the source": lambda s: _restart(s, s.source, "kubelet"),
    "restart kubelet of the target": lambda s: _restart(s, s.target, "kubelet"),
    "restart containerd of the source": lambda s: _restart(s, s.source, "containerd"),
    "restart containerd of the target": lambda s: _restart(s, s.target, "containerd"),
    "kill CRIU": _kill_criu,
    "cut the agents' link for 5 s": lambda s: _cut(
        s, s.source, f"tcp dport {_AGENT_PORTS} drop", 5
    ),
    "API server away for 10 s": _api_away,
    "delete the migration": lambda s: _delete(s, "podmigration", s.migration),
    "delete the pod": lambda s: _delete(s, "pod", POD),
    "end the process": lambda s: _kill(s, s.source, "^redis-server"),
}
