"""Pure parts: what containerd's configuration says, and what we add to it."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from typing import Any

HANDLER = "godwit"
CNI_DIRECTORY = "/etc/godwit/cni/net.d"
WRAPPER = "/opt/godwit/bin/godwit-runc"
# Main plugins whose datapath is the kernel's own routing.
ROUTED_PLUGINS = frozenset({"ptp", "bridge"})
# Name of the CRI plugin's runtime part, by version of the configuration file. Both kinds of
# file are read by containerd 2, which dumps everything as version 3.
_RUNTIME_PLUGIN = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


@dataclass(frozen=True)
class RuntimeConfig:
    """What matters of ``containerd config dump``; ``rest`` is all of it but our handler."""

    systemd_cgroup: bool
    runc: str
    cni_bin_dirs: tuple[str, ...]
    cni_conf_dir: str
    handlers: frozenset[str]
    rest: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a node cannot take part: CamelCase reason, and the way out."""

    reason: str
    message: str


def parse_dump(text: str) -> RuntimeConfig:
    """Reads the effective configuration; raises ``ValueError`` for containerd before 2.0.

    ``runc`` is the program of the handler of that name; empty for the one in PATH.
    """
    config = tomllib.loads(text)
    plugin = config.get("plugins", {}).get(_RUNTIME_PLUGIN[3])
    if plugin is None:
        raise ValueError(f"no plugin {_RUNTIME_PLUGIN[3]}: containerd 2.0 or later is needed")
    cni = plugin.get("cni", {})
    runtimes = plugin.get("containerd", {}).get("runtimes", {})
    handlers = frozenset(runtimes)
    runtimes.pop(HANDLER, None)
    options = runtimes.get("runc", {}).get("options", {})
    bin_dirs = cni.get("bin_dirs") or [cni.get("bin_dir") or "/opt/cni/bin"]
    return RuntimeConfig(
        systemd_cgroup=bool(options.get("SystemdCgroup")),
        runc=options.get("BinaryName") or "",
        cni_bin_dirs=tuple(bin_dirs),
        cni_conf_dir=cni.get("conf_dir") or "/etc/cni/net.d",
        handlers=handlers,
        rest=config,
    )


def config_version(main_config: str) -> int:
    """Version of the main configuration file, which a drop-in has to have too.

    Measured with containerd 2.1.9: a drop-in of version 3 beside a file of version 2 makes
    containerd forget that file's CRI settings (``SystemdCgroup`` among them), and a drop-in of
    version 2 beside a file of version 3 is ignored. A file without version counts as 2.
    Raises ``ValueError`` when the file is no TOML or has a version that is not known.
    """
    version = tomllib.loads(main_config).get("version", 2)
    if version not in _RUNTIME_PLUGIN:
        raise ValueError(f"version = {version} is not supported, only 2 and 3 are")
    return int(version)


def version_problem(text: str) -> Problem | None:
    """``containerd --version`` output; containerd 2.0 is the first with what we need."""
    found = re.search(r"\sv?(\d+)\.(\d+)\.\d+", text)
    if found and int(found.group(1)) >= 2:
        return None
    return Problem("NodeNotPrepared", f"containerd 2.0 or later is needed, this is: {text.strip()}")


def drop_in(runtime: RuntimeConfig, version: int) -> str:
    """The runtime handler, beside the node's own."""
    table = f'plugins."{_RUNTIME_PLUGIN[version]}".containerd.runtimes.{HANDLER}'
    return (
        "# Written by Godwit's node agent; removed by `helm uninstall`.\n"
        f"version = {version}\n"
        f"[{table}]\n"
        '  runtime_type = "io.containerd.runc.v2"\n'
        f'  cni_conf_dir = "{CNI_DIRECTORY}"\n'
        f"[{table}.options]\n"
        f'  BinaryName = "{WRAPPER}"\n'
        f"  SystemdCgroup = {str(runtime.systemd_cgroup).lower()}\n"
    )


def drop_in_problem(before: RuntimeConfig, after: RuntimeConfig, path: str) -> Problem | None:
    """Whether the drop-in has the effect it must have, and no other."""
    if HANDLER not in after.handlers:
        directory = path.rpartition("/")[0]
        return Problem(
            "NodeNotPrepared",
            f"containerd's configuration does not import {path}: add "
            f'`imports = ["{directory}/*.toml"]` at its top',
        )
    if before.rest != after.rest:
        return Problem(
            "NodeNotPrepared",
            f"{path} would change containerd's other settings, so it was taken back; use a "
            "containerd configuration file of version 3",
        )
    return None


def chain(name: str, text: str) -> tuple[str | None, list[Problem]]:
    """The handler's CNI chain made from the node's own, and what is wrong with that one.

    The network keeps its name, so that both chains share host-local's reservations.
    """
    try:
        config: Any = json.loads(text)
    except ValueError as error:
        return None, [Problem("NetworkNotRouted", f"{name} is no JSON: {error}")]
    if not isinstance(config, dict):
        return None, [Problem("NetworkNotRouted", f"{name} is no CNI configuration")]
    plugins = config.get("plugins", [config])
    if not isinstance(plugins, list) or not all(isinstance(item, dict) for item in plugins):
        return None, [Problem("NetworkNotRouted", f"{name}: `plugins` is no list of objects")]
    if not plugins or not config.get("name"):
        return None, [Problem("NetworkNotRouted", f"{name} has no plugins or no name")]
    if "plugins" not in config:
        config = {"cniVersion": config.get("cniVersion", "1.0.0"), "name": config["name"]}
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
    ipam = (main.get("ipam") or {}).get("type")
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
