"""How much memory the agents take of their own, beside the images they hold."""

from __future__ import annotations

import subprocess
import threading

from lab.cluster import Cluster

# Until its standard input ends: who is killed here leaves what it has started on the node.
_SCRIPT = """
pid=$(pgrep -o -f 'godwit_agent$')
while sed -n 's/^RssAnon:[^0-9]*\\([0-9]*\\) kB/\\1/p' "/proc/$pid/status"; do
  read -r -t 0.2
  [ $? -gt 128 ] || break
done
"""


class AgentMemory:
    """Peak of each agent's anonymous memory, in bytes, while the block runs, and before it."""

    def __init__(self, cluster: Cluster, nodes: list[str]) -> None:
        self._cluster = cluster
        self._seen: dict[str, list[int]] = {node: [] for node in nodes}
        self._running: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def __enter__(self) -> AgentMemory:
        for node in self._seen:
            watch = subprocess.Popen(
                self._cluster.argv("node", "exec", node, "--", "bash", "-c", _SCRIPT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            thread = threading.Thread(target=self._read, args=(node, watch), daemon=True)
            thread.start()
            self._running.append((watch, thread))
        return self

    def __exit__(self, *_: object) -> None:
        for watch, thread in self._running:
            assert watch.stdin
            watch.stdin.close()
            watch.wait(30)
            thread.join(30)

    def _read(self, node: str, watch: subprocess.Popen[str]) -> None:
        assert watch.stdout
        with watch.stdout:
            for line in watch.stdout:
                self._seen[node].append(int(line) * 1024)

    def to_json(self) -> dict[str, dict[str, int]]:
        """Per node: first and largest value."""
        return {
            node: {"first_bytes": seen[0], "peak_bytes": max(seen)}
            for node, seen in self._seen.items()
            if seen
        }
