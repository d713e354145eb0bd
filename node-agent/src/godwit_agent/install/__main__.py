"""Command line of the installer."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from godwit_agent.install import node, report, retire
from godwit_agent.install.host import Host
from godwit_agent.install.kube import Api


def main() -> int:
    """``install`` never fails for what a person must mend on the node: the node says it itself."""
    parser = argparse.ArgumentParser(prog="godwit_agent.install", description=__doc__)
    parser.add_argument("command", choices=("install", "uninstall", "retire"))
    parser.add_argument("--payload", type=Path, default=Path("/payload"))
    options = parser.parse_args()
    api = Api()
    if options.command == "retire":
        return retire.retire(api)
    name = os.environ["GODWIT_NODE_NAME"]
    restart = os.environ.get("GODWIT_RESTART_COMMAND", "systemctl restart containerd")
    host = Host()
    if options.command == "uninstall":
        node.uninstall(host, restart)
        report.withdraw(api, name)
        return 0
    problems = node.install(host, options.payload, restart)
    for problem in problems:
        sys.stderr.write(f"{problem.reason}: {problem.message}\n")
    report.publish(api, name, problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
