"""The software of docs/support.md: the same commands for our tests and for podman beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Software:
    """A server, and who uses it while it moves.

    ``image``: directory of ``lab``. ``client``: a script of ``lab/servers`` with its words before
    ADDRESS and PORT, and those after them.
    """

    row: str
    image: str
    command: tuple[str, ...]
    port: int
    client: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _many(protocol: str, connections: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("many.py", protocol), ("--connections", str(connections))


def _lines(language: str, connections: int, image: str, *command: str) -> Software:
    return Software(
        f"{language}, {connections} connections", image, command, 7000, *_many("lines", connections)
    )


LANGUAGES = {
    "Python": _lines("Python", 200, "servers", "python3", "/lab/lines.py"),
    "Node.js": _lines("Node.js", 200, "servers", "node", "/lab/lines.js"),
    "Go": _lines("Go", 300, "servers", "/lab/lines"),
    "OpenJDK": _lines("OpenJDK", 300, "java", "java", "-cp", "/lab/lines", "Lines"),
}

REDIS = Software(
    "Redis, append-only file, 50 connections",
    "servers",
    (
        *("redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data"),
        *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    ),
    6379,
    *_many("redis", 50),
)
MEMCACHED = Software(
    "memcached, 100 connections",
    "servers",
    ("memcached", "-u", "nobody", "-l", "0.0.0.0"),
    11211,
    *_many("memcached", 100),
)
NATS = Software(
    "NATS, 4 publishers and 8 subscribers",
    "servers",
    ("nats-server", "-a", "0.0.0.0"),
    4222,
    ("pubsub.py",),
)
WILDFLY = Software(
    "WildFly 38 on OpenJDK, 8 connections, counting in the heap",
    "java",
    ("/opt/wildfly/bin/standalone.sh", "-b", "0.0.0.0"),
    8080,
    *_many("http", 8),
    environment=(("JAVA_OPTS", "-Xms128m -Xmx256m -Djava.net.preferIPv4Stack=true"),),
)
NGINX = Software(
    "nginx, 3 downloads of 60 MB in flight",
    "servers",
    ("nginx", "-g", "daemon off;"),
    80,
    ("download.py",),
)
UDP_ECHO = Software(
    "ECHO over UDP, one every 3 ms",
    "servers",
    ("python3", "/lab/echo.py"),
    7000,
    ("datagrams.py", "echo"),
)
DNS = Software(
    "DNS over UDP, one every 3 ms",
    "servers",
    (
        *("dnsmasq", "--keep-in-foreground", "--user=root", "--no-resolv", "--no-hosts"),
        "--address=/godwit.test/192.0.2.7",
    ),
    53,
    ("datagrams.py", "dns"),
)
POSTGRESQL = Software(
    "PostgreSQL 18, pgbench with 8 clients",
    "databases",
    ("start-postgres", "-c", "shared_buffers=64MB"),
    5432,
)
MARIADB = Software("MariaDB, 8 clients", "databases", ("start-mariadb",), 3306)
SHELL = Software("bash on the container's terminal", "servers", ("bash", "--norc"), 0)
TMUX = Software(
    "tmux, two windows",
    "servers",
    ("tmux", "-f", "/dev/null", "new-session", "-s", "work", "-n", "one", "bash --norc"),
    0,
)
ALL = (
    NGINX, *LANGUAGES.values(), POSTGRESQL, MARIADB, REDIS, MEMCACHED, NATS, UDP_ECHO, DNS, WILDFLY,
    SHELL, TMUX,
)  # fmt: skip
