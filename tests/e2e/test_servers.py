"""Servers move while many clients talk to them; every reply is right."""

from __future__ import annotations

import pytest

from e2e.moving import FILTERED, client, many, report, start, there_and_back
from e2e.support import Scene

pytestmark = pytest.mark.support

_DOWNLOAD = """
import hashlib, json, socket, sys, time
connection = socket.create_connection((sys.argv[1], 80), 20)
connection.settimeout(60)
connection.sendall(b"GET /large HTTP/1.0\\r\\n\\r\\n")
answer = connection.makefile("rb")
while answer.readline() != b"\\r\\n": pass
digest = hashlib.sha256(answer.read(1 << 16))
print("ready", flush=True)
worst, last = 0.0, time.monotonic()
while data := answer.read(1 << 16):
    worst, last = max(worst, time.monotonic() - last), time.monotonic()
    digest.update(data)
    time.sleep(0.01)
print(json.dumps({"digest": digest.hexdigest(), "worst_ms": worst * 1e3}))
"""


# name: command, connections
LANGUAGES = {
    "Python": (["python3", "/lab/lines.py"], 200),
    "Node.js": (["node", "/lab/lines.js"], 200),
    "Go": (["/lab/lines"], 300),
    "OpenJDK": (["java", "-cp", "/lab/lines", "Lines"], 300),
}


def test_nginx_downloads_are_byte_exact(scene: Scene) -> None:
    address = start(scene, "servers", 80, "nginx", "-g", "daemon off;")
    wanted = scene.cluster.kubectl(
        *("exec", "server", "-n", scene.namespace, "--", "sha256sum", "/var/www/html/large")
    ).split()[0]
    downloads = [client(scene, "-c", _DOWNLOAD, address) for _ in range(3)]
    moves = there_and_back(scene)
    ends = [report(one) for one in downloads]
    assert [one["digest"] for one in ends] == [wanted] * 3
    gap = max(one["worst_ms"] for one in ends)
    scene.record("nginx, 3 downloads of 60 MB in flight", moves, gap)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_connection_lives_and_every_reply_is_right(scene: Scene, language: str) -> None:
    """A thread (or what the language has) per connection; all are in use while it moves."""
    command, connections = LANGUAGES[language]
    image = "java" if language == "OpenJDK" else "servers"
    options = FILTERED if language == "Node.js" else {}
    address = start(scene, image, 7000, *command, **options)
    using = many(scene, "lines", address, 7000, connections)
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert len(seen["each"]) == connections
    assert min(seen["each"]) > 2
    scene.record(f"{language}, {connections} connections", moves, seen["worst_ms"])
