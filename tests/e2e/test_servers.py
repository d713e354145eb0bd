"""Servers move while many clients talk to them; every reply is right."""

from __future__ import annotations

import pytest

from e2e.moving import FILTERED, exec_in, report, start_it, there_and_back, use
from e2e.support import Scene
from lab.software import LANGUAGES, NGINX

pytestmark = pytest.mark.support


def test_nginx_downloads_are_byte_exact(scene: Scene) -> None:
    address = start_it(scene, NGINX)
    wanted = exec_in(scene, "server", "sha256sum", "/var/www/html/large").split()[0]
    using = use(scene, NGINX, address)
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert seen["digests"] == [wanted] * 3
    scene.record(NGINX.row, moves, seen["worst_ms"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_connection_lives_and_every_reply_is_right(scene: Scene, language: str) -> None:
    """A thread (or what the language has) per connection; all are in use while it moves."""
    software = LANGUAGES[language]
    address = start_it(scene, software, **FILTERED if language == "Node.js" else {})
    using = use(scene, software, address)
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert min(seen["each"]) > 2
    scene.record(software.row, moves, seen["worst_ms"])
