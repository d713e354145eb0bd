"""What podman does with the software of docs/support.md, on the same machine: one line each.

``python -m lab.beside FILE [ROW…]`` appends to ``FILE`` what ``lab/podman_moves.py`` says:
``podman container checkpoint --export`` and ``restore --import`` with ``--tcp-established`` and
``--file-locks``, on its own bridge, under its default seccomp profile, with runc as here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lab import software
from lab.cluster import BASE_IMAGE, ROOT, Cluster, CommandFailed, say
from lab.software import Software

_SCRIPTS = ROOT / "lab" / "servers"
_MOVES = ROOT / "lab" / "podman_moves.py"
_TIDY = (
    'source=$1; shift; python3 -c "$source" "$@"; '
    'find /sys/fs/cgroup -depth -path "*/libpod_parent*" -type d -exec rmdir {} + 2>/dev/null; true'
)
_PGBENCH = """
bin=/usr/lib/postgresql/current/bin
$bin/pgbench -n -h ADDRESS -U postgres -c 8 -j 2 -T 3600 -P 1 bench >/tmp/out 2>&1 & pid=$!
until grep -q progress /tmp/out; do kill -0 $pid || { cat /tmp/out >&2; exit 1; }; sleep 0.1; done
echo ready
read end
kill -ALRM $pid; wait $pid; code=$?
grep -q 'failed transactions: 0 ' /tmp/out || { tail -n 3 /tmp/out >&2; exit 1; }
exit $code
"""
_TMUX = ("tmux", "send-keys", "-t", "work")


def job(it: Software) -> dict[str, Any]:
    """What ``lab/podman_moves.py`` is asked to do."""
    asked: dict[str, Any] = {
        "command": it.command,
        "environment": it.environment,
        "terminal": not it.port,
        "port": it.port,
    }
    if it.client:
        script, *words = it.client
        asked["client"] = (_SCRIPTS / script).read_text()
        asked["words"] = [*words, "ADDRESS", str(it.port), *it.more]
    if it is software.WILDFLY:
        asked["ready"] = "/counter/"
    if it is software.POSTGRESQL:
        asked["beside"] = ["sh", "-c", _PGBENCH]
    if it is software.MARIADB:
        asked["beside"] = ["python3", "/lab/transfers.py", "ADDRESS"]
    if it is software.TMUX:
        asked["before"] = [[*_TMUX, "x=41", "Enter"]]
        asked["after"] = [[*_TMUX, "echo is$((x+1))", "Enter"]]
        asked |= {"look": ["tmux", "capture-pane", "-p", "-t", "work"], "shows": "is42"}
    return asked


def archive(cluster: Cluster, image: str) -> str:
    """File name of an image among the testbed's archives."""
    tag = f"godwit.local/lab-{image}:{cluster.name}"
    if os.environ.get("GODWIT_E2E_AS_IS"):
        return tag.replace("/", "_").replace(":", "_") + ".tar"
    words = ("image", "build", "-t", tag, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}")
    return Path(cluster.run(*words, str(ROOT / "lab" / image)).strip()).name


def beside(cluster: Cluster, image: str, its: list[Software]) -> list[dict[str, Any]]:
    """What podman made of each."""
    say(f"podman: {', '.join(it.row for it in its)}")
    jobs = [json.dumps(job(it)) for it in its]
    words = ("sh", "-c", _TIDY, "podman", _MOVES.read_text(), archive(cluster, image), *jobs)
    printed = cluster.run("tools", "exec", "--", *words).splitlines()
    if len(printed) != len(its):
        raise CommandFailed(f"podman: {printed}")
    lines = [{"podman": it.row, **json.loads(line)} for it, line in zip(its, printed, strict=True)]
    for line in lines:
        say(f"  {line}")
    return lines


def main() -> None:
    """Command line entry."""
    cluster, chosen = Cluster(), sys.argv[2:]
    its = [it for it in software.ALL if not chosen or any(word in it.row for word in chosen)]
    for image in dict.fromkeys(it.image for it in its):
        lines = beside(cluster, image, [it for it in its if it.image == image])
        with Path(sys.argv[1]).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
