"""Command line of the installer."""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
from pathlib import Path

from godwit_agent.install import node, report, retire
from godwit_agent.install.host import Host
from godwit_agent.install.kube import Api
from godwit_agent.install.runtime_config import Problem

_POLL_SECONDS = 10.0
_RETRY_SECONDS = 60.0
_CA_SECONDS = 60.0
_UNUSED_SECONDS = 120.0
_COMMANDS = {
    "install": "prepare the node and say on the Node object whether it is",
    "keep": "install, and again whenever something it depends on changes; does not end",
    "check": "say what is in the way, without changing anything",
    "uninstall": "undo install on this node",
    "retire": "undo install on every node (helm uninstall starts this)",
}


def main() -> int:
    """``install`` never fails for what a person must mend on the node: the node says it itself."""
    parser = argparse.ArgumentParser(
        prog="godwit_agent.install",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<10} {what}" for name, what in _COMMANDS.items()),
    )
    parser.add_argument("command", choices=tuple(_COMMANDS))
    command = parser.parse_args().command
    if command == "retire":
        return retire.retire(Api())
    host, settings = Host(), _settings()
    if command == "check":
        _, problems = node.inspect(host, settings)
        _say(problems)
        return 1 if problems else 0
    api, name = Api(), os.environ["GODWIT_NODE_NAME"]
    if command == "uninstall":
        node.await_unused(host, _UNUSED_SECONDS)
        try:
            node.uninstall(host, settings)
        except node.InUse as error:
            sys.stderr.write(f"{name}: {error}\n")
            return 1
        report.withdraw(api, name)
        return 0
    prepared = _install(host, settings, api, name)
    if command == "keep":
        _await_ca(api)
        Path(os.environ["GODWIT_STARTED_FILE"]).touch()
        _keep(host, settings, api, name, prepared)
    return 0


def _settings() -> node.Settings:
    given = {
        "restart": os.environ.get("GODWIT_RESTART_COMMAND"),
        "config": os.environ.get("GODWIT_CONTAINERD_CONFIG"),
        "socket": os.environ.get("GODWIT_CONTAINERD_SOCKET"),
    }
    return node.Settings(**{key: value for key, value in given.items() if value})  # type: ignore[arg-type]


def _say(problems: list[Problem]) -> None:
    for problem in problems:
        sys.stderr.write(f"{problem.reason}: {problem.message}\n")


def _install(host: Host, settings: node.Settings, api: Api, name: str) -> bool:
    """Whether the node is prepared."""
    problems = node.install(host, settings)
    _say(problems)
    report.publish(api, name, problems)
    return not problems


def _keep(host: Host, settings: node.Settings, api: Api, name: str, prepared: bool) -> None:
    """A node may get its network after its agent, or lose what we gave it."""
    known, tried = node.fingerprint(host, settings), time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        due = not prepared and time.monotonic() - tried > _RETRY_SECONDS
        if not due and node.fingerprint(host, settings) == known:
            continue
        prepared = _install(host, settings, api, name)
        known, tried = node.fingerprint(host, settings), time.monotonic()


def _await_ca(api: Api) -> None:
    """Wait for the operator's certificate: mounted too early, the agent would not see it for
    the minute or more that the kubelet takes to refresh a volume."""
    deadline = time.monotonic() + _CA_SECONDS
    path = f"/api/v1/namespaces/{os.environ['GODWIT_NAMESPACE']}/configmaps/godwit-ca"
    while time.monotonic() < deadline:
        try:
            if not api.missing(path):
                return
        except (urllib.error.URLError, TimeoutError) as error:
            sys.stderr.write(f"waiting for ConfigMap godwit-ca: {error}\n")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
