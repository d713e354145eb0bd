"""A copy of runc's state of a container that names other cgroups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason


def write_shadow(
    layout: Layout, container: Container, cgroups: Mapping[str, str], root: Path
) -> None:
    """Makes ``root`` a runc root that knows ``container`` in ``cgroups`` (controller to path).

    runc (libcontainer/state_linux.go, 1.3) loads its cgroup manager from
    ``cgroup_paths`` and hands the freezer among them to CRIU.
    """
    source = layout.local(f"{container.runc_root}/{container.id}/state.json")
    try:
        state = json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        message = f"state of container {container.id}: {error}"
        raise Retryable(Reason.INTERNAL, message) from error
    state["cgroup_paths"] = {name: cgroups.get(name, path) for name, path in _paths(state)}
    # the bundle's hooks would run for a container that has not stopped
    state["config"]["Hooks"] = None
    target = root / container.id
    target.mkdir(mode=0o700)
    (target / "state.json").write_text(json.dumps(state))


def _paths(state: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    return list((state.get("cgroup_paths") or {}).items())
