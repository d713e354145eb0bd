"""Pure parts: what containerd's configuration says, and what we add to it."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass
from typing import Any

HANDLER = "godwit"
DROP_IN = "/etc/containerd/conf.d/godwit.toml"
CNI_DIRECTORY = "/etc/godwit/cni/net.d"
WRAPPER = "/opt/godwit/bin/godwit-runc"
# Main plugins whose datapath is the kernel's own routing.
ROUTED_PLUGINS = frozenset({"ptp", "bridge"})
_RUNTIME_PLUGIN = "io.containerd.cri.v1.runtime"


@dataclass(frozen=True)
class RuntimeConfig:
    """What matters of ``containerd config dump``."""

    systemd_cgroup: bool
    cni_bin_dirs: tuple[str, ...]
    cni_conf_dir: str
    handlers: frozenset[str]


@dataclass(frozen=True)
class Problem:
    """Why a node cannot take part: CamelCase reason, and the way out."""

    reason: str
    message: str


def parse_dump(text: str) -> RuntimeConfig:
    """Reads the effective configuration; raises ``ValueError`` for containerd before 2.0."""
    config = tomllib.loads(text)
    plugin = config.get("plugins", {}).get(_RUNTIME_PLUGIN)
    if plugin is None:
        raise ValueError(f"no plugin {_RUNTIME_PLUGIN}: containerd 2.0 or later is needed")
    cni = plugin.get("cni", {})
    runtimes = plugin.get("containerd", {}).get("runtimes", {})
    bin_dirs = cni.get("bin_dirs") or [cni.get("bin_dir") or "/opt/cni/bin"]
    return RuntimeConfig(
        systemd_cgroup=bool(runtimes.get("runc", {}).get("options", {}).get("SystemdCgroup")),
        cni_bin_dirs=tuple(bin_dirs),
        cni_conf_dir=cni.get("conf_dir") or "/etc/cni/net.d",
        handlers=frozenset(runtimes),
    )


def imports_drop_in(main_config: str) -> bool:
    """Whether the main configuration file imports our drop-in."""
    patterns = tomllib.loads(main_config).get("imports", [])
    return any(fnmatch.fnmatch(DROP_IN, pattern) for pattern in patterns)


def version_problem(text: str) -> Problem | None:
    """``containerd --version`` output; containerd 2.0 is the first with what we need."""
    found = re.search(r"\sv?(\d+)\.(\d+)\.\d+", text)
    if found and int(found.group(1)) >= 2:
        return None
    return Problem("NodeNotPrepared", f"containerd 2.0 or later is needed, this is: {text.strip()}")


def drop_in(runtime: RuntimeConfig) -> str:
    """The runtime handler, beside the node's own."""
    table = f"plugins.'{_RUNTIME_PLUGIN}'.containerd.runtimes.{HANDLER}"
    return (
        "# Written by Godwit's node agent; removed by `helm uninstall`.\n"
        "version = 3\n"
        f"[{table}]\n"
        '  runtime_type = "io.containerd.runc.v2"\n'
        f'  cni_conf_dir = "{CNI_DIRECTORY}"\n'
        f"[{table}.options]\n"
        f'  BinaryName = "{WRAPPER}"\n'
        f"  SystemdCgroup = {str(runtime.systemd_cgroup).lower()}\n"
    )


def chain(name: str, text: str) -> tuple[str | None, list[Problem]]:
    """The handler's CNI chain made from the node's own, and what is wrong with that one.

    The network keeps its name, so that both chains share host-local's reservations.
    """
    try:
        config: dict[str, Any] = json.loads(text)
    except ValueError as error:
        return None, [Problem("NetworkNotRouted", f"{name} is no JSON: {error}")]
    plugins = config.get("plugins") or [config]
    if config.get("plugins") is None:
        config = {
            "cniVersion": config.get("cniVersion", "1.0.0"),
            "name": config.get("name", "network"),
            "plugins": plugins,
        }
    main = plugins[0]
    problems = []
    if main.get("type") not in ROUTED_PLUGINS:
        problems.append(
            Problem(
                "NetworkNotRouted",
                f"{name}: the main CNI plugin is {main.get('type')}; an address can follow its "
                f"pod only where the kernel routes ({', '.join(sorted(ROUTED_PLUGINS))})",
            )
        )
    ipam = main.get("ipam", {}).get("type")
    if ipam != "host-local":
        problems.append(
            Problem(
                "AddressNotReservable",
                f"{name}: addresses come from the IPAM plugin {ipam}; only host-local can keep "
                "the address of a pod that has left",
            )
        )
    kept = [plugin for plugin in plugins if plugin.get("type") != "godwit"]
    made = {**config, "plugins": [*kept, {"type": "godwit"}]}
    return json.dumps(made, indent=2) + "\n", problems
