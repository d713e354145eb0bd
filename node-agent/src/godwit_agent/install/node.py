"""The steps that prepare a node, each idempotent, and their undoing."""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit_agent.install.host import Host
from godwit_agent.install.runtime_config import (
    CNI_DIRECTORY,
    HANDLER,
    WRAPPER,
    Problem,
    RuntimeConfig,
    chain,
    config_version,
    drop_in,
    drop_in_problem,
    parse_dump,
    version_problem,
)

OPT = "/opt/godwit"
CONFLIST = f"{CNI_DIRECTORY}/10-godwit.conflist"
MANIFEST = f"{OPT}/etc/installed.json"
_HOOK = "bin/godwit-hook"
_TASKS = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
# A lazy dump keeps all dirty pages in pipes; without CAP_SYS_RESOURCE root is bound by these
# limits too (pipe(7)).
_PIPE_LIMITS = {"pipe-user-pages-soft": 0, "pipe-max-size": 16_777_216}
# Of godwit_agent.hostops, which the installer does not load: it would bring pyroute2 along.
ROUTE_PROTOCOL = 87
TABLES = "godwit_"
CGROUPS = ("godwit", "godwit-tools")
_SPACE_BYTES = {"/run": 64 << 20}
_RESTART_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What differs between kinds of nodes."""

    payload: Path = Path("/payload")
    restart: str = "systemctl restart containerd"
    config: str = "/etc/containerd/config.toml"
    socket: str = "/run/containerd/containerd.sock"

    @property
    def drop_in(self) -> str:
        """Our own file beside containerd's configuration."""
        return f"{self.config.rpartition('/')[0]}/conf.d/godwit.toml"


@dataclass(frozen=True)
class Plan:
    """What a node without problems gets."""

    containerd: str
    runc: str
    runtime: RuntimeConfig
    version: int
    chain: str


@dataclass(frozen=True)
class InUse(Exception):
    """Containers of our handler are left on the node: without it nothing could stop them."""

    containers: tuple[str, ...]

    def __str__(self) -> str:
        return f"containers still use the runtime handler: {', '.join(self.containers[:10])}"


def inspect(host: Host, settings: Settings) -> tuple[Plan | None, list[Problem]]:
    """Everything that is in the way, found without changing anything."""
    problems = list(_space_problems(host, settings))
    containerd, version = host.which("containerd"), 0
    if containerd is None:
        return None, [*problems, _unprepared("containerd is not installed on the node")]
    if problem := version_problem(host.run(containerd, "--version").stdout):
        return None, [*problems, problem]
    try:
        version = config_version(host.read(settings.config) or "")
    except ValueError as error:
        problems.append(_unprepared(f"{settings.config}: {error}"))
    try:
        runtime = _effective(host, settings, containerd)
    except ValueError as error:
        return None, [*problems, _unprepared(f"containerd config dump: {error}")]
    runc = runtime.runc if runtime.runc.startswith("/") else host.which(runtime.runc or "runc")
    if runc is None or not host.path(runc).exists():
        problems.append(_unprepared(f"{runc or runtime.runc or 'runc'} is not on the node"))
    made, network_problems = _chain(host, runtime)
    problems += network_problems
    if runc is None or made is None or not version:
        return None, problems
    return Plan(containerd, runc, runtime, version, made), problems


def install(host: Host, settings: Settings) -> list[Problem]:
    """Prepare the node; returns everything that is in the way, having done what can be done."""
    plan, problems = inspect(host, settings)
    if not any(problem.reason == "NotEnoughSpace" for problem in problems):
        _place_payload(host, settings.payload)
        problems += _criu_problems(host)
    if problems or plan is None:
        return problems
    for directory in ("/run/godwit", "/var/lib/godwit"):
        host.path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    host.write(f"{OPT}/etc/hook.json", json.dumps({"runtime": plan.runc}) + "\n")
    plugin = f"{plan.runtime.cni_bin_dirs[0]}/godwit"
    _remember(
        host,
        plugin=plugin,
        drop_in=settings.drop_in,
        directories=_missing(host, settings),
        cni_conf_dir=plan.runtime.cni_conf_dir,
    )
    _copy(host, settings.payload / _HOOK, plugin)
    host.write(CONFLIST, plan.chain)
    _raise_pipe_limits(host)
    problem = _register(host, settings, plan)
    return [problem] if problem else []


def _missing(host: Host, settings: Settings) -> list[str]:
    """Directories that we make, and that others might use once they are there."""
    directory = settings.drop_in.rpartition("/")[0]
    known = list(_manifest(host).get("directories", []))
    if not host.path(directory).exists() and directory not in known:
        known.append(directory)
    return known


def _unprepared(message: str) -> Problem:
    return Problem("NodeNotPrepared", message)


def _effective(host: Host, settings: Settings, containerd: str) -> RuntimeConfig:
    done = host.run(containerd, "--config", settings.config, "config", "dump")
    if done.returncode:
        raise ValueError(done.stderr.strip()[-500:])
    return parse_dump(done.stdout)


def _space_problems(host: Host, settings: Settings) -> Iterator[Problem]:
    wanted = dict(_SPACE_BYTES)
    if not host.path(f"{OPT}/{_HOOK}").exists():
        # Every file is written beside its old one before it takes its place.
        wanted["/opt"] = 2 * sum(
            file.stat().st_size for file in settings.payload.rglob("*") if file.is_file()
        )
    for directory, size in wanted.items():
        place = host.path(directory)
        while not place.exists():
            place = place.parent
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize
        if free < size:
            yield Problem(
                "NotEnoughSpace",
                f"{directory} has {free >> 20} MiB left, {(size >> 20) + 1} MiB are needed",
            )


def _chain(host: Host, runtime: RuntimeConfig) -> tuple[str | None, list[Problem]]:
    directory = host.path(runtime.cni_conf_dir)
    files = sorted(
        file
        for file in (directory.iterdir() if directory.is_dir() else [])
        if file.suffix in (".conflist", ".conf", ".json")
    )
    if not files:
        return None, [
            Problem("NetworkNotRouted", f"there is no CNI configuration in {runtime.cni_conf_dir}")
        ]
    return chain(f"{runtime.cni_conf_dir}/{files[0].name}", files[0].read_text())


def _copy(host: Host, source: Path, path: str, mode: int = 0o755) -> None:
    """Copy what differs: a running binary keeps its file when nothing is new."""
    target = host.path(path)
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    host.copy(source, path, mode)


def _place_payload(host: Host, payload: Path) -> None:
    files = {
        f"{OPT}/{source.relative_to(payload)}": source
        for source in sorted(payload.rglob("*"))
        if source.is_file()
    }
    for stale in sorted(set(_manifest(host).get("payload", [])) - set(files)):
        host.remove(stale)
    _remember(host, payload=sorted(files))
    for path, source in files.items():
        _copy(host, source, path, source.stat().st_mode & 0o755)
    host.link(f"{OPT}/bin/godwit-runc", "godwit-hook")
    host.link(f"{OPT}/gate/criu", f"../{_HOOK}")


def _manifest(host: Host) -> dict[str, Any]:
    found = json.loads(host.read(MANIFEST) or "{}")
    assert isinstance(found, dict)
    return found


def _remember(host: Host, **created: Any) -> None:
    """Record what is about to be made, so that ``uninstall`` finds it after any crash."""
    host.write(MANIFEST, json.dumps({**_manifest(host), **created}, indent=1) + "\n")


def _raise_pipe_limits(host: Host) -> None:
    """Raise what is too low, and keep the old values for ``uninstall``."""
    old = dict(_manifest(host).get("pipe_limits", {}))
    for name, wanted in _PIPE_LIMITS.items():
        file = host.path(f"/proc/sys/fs/{name}")
        current = int(file.read_text())
        if current == wanted or (wanted and current >= wanted):
            continue
        old.setdefault(name, current)
        _remember(host, pipe_limits=old)
        file.write_text(str(wanted))


def _criu_problems(host: Host) -> list[Problem]:
    done = host.run(f"{OPT}/criu/criu", "check")
    if done.returncode == 0:
        return []
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
    return [_unprepared(f"criu check: {'; '.join(lines[-3:]) or f'exit {done.returncode}'}")]


def _register(host: Host, settings: Settings, plan: Plan) -> Problem | None:
    """Give containerd the handler; a configuration that does not work is taken back."""
    previous = host.read(settings.drop_in)
    changed = host.write(settings.drop_in, drop_in(plan.runtime, plan.version))
    try:
        after = _effective(host, settings, plan.containerd)
        problem = drop_in_problem(plan.runtime, after, settings.drop_in)
    except ValueError as error:
        problem = _unprepared(f"containerd refuses {settings.drop_in}: {error}")
    if problem is None and (changed or not host.knows_handler(settings.socket, HANDLER)):
        problem = _restart(host, settings)
        if problem and changed:
            _put_back(host, settings.drop_in, previous)
            host.run(*shlex.split(settings.restart))
    elif problem and changed:
        _put_back(host, settings.drop_in, previous)
    return problem


def _put_back(host: Host, path: str, text: str | None) -> None:
    if text is None:
        host.remove(path)
    else:
        host.write(path, text)


def _restart(host: Host, settings: Settings) -> Problem | None:
    """Restart containerd (its containers live on) and wait until it knows the handler."""
    done = host.run(*shlex.split(settings.restart))
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        return _unprepared(f"`{settings.restart}` failed: {said}")
    deadline = time.monotonic() + _RESTART_SECONDS
    while time.monotonic() < deadline:
        if host.knows_handler(settings.socket, HANDLER):
            return None
        time.sleep(0.2)
    return _unprepared(
        f"containerd did not come back with the handler in {_RESTART_SECONDS:.0f} s after "
        f"`{settings.restart}`"
    )


def fingerprint(host: Host, settings: Settings) -> tuple[object, ...]:
    """Changes when something that ``install`` looks at has changed; costs a few stat calls."""
    manifest = _manifest(host)
    paths = [settings.config, manifest.get("plugin", OPT), CONFLIST, f"{OPT}/{_HOOK}"]
    paths += ["/run/godwit", f"{OPT}/etc/hook.json"]
    paths += [path for name in ("containerd", "runc") if (path := host.which(name))]
    directories = (settings.drop_in.rpartition("/")[0], manifest.get("cni_conf_dir", OPT))
    for directory in directories:
        place = host.path(directory)
        if place.is_dir():
            paths += sorted(f"{directory}/{file.name}" for file in place.iterdir())
    return tuple(_stamp(host.path(path)) for path in paths)


def _stamp(path: Path) -> tuple[object, ...]:
    try:
        state = path.stat()
    except OSError:
        return (str(path),)
    if path.is_dir():
        return str(path), state.st_ino
    return str(path), state.st_ino, state.st_size, state.st_mtime_ns


def in_use(host: Host) -> list[str]:
    """Ids of containers, sandboxes too, whose runtime is our wrapper.

    What containerd has left of a container that is long gone is none: without a process there is
    nothing to stop, and without a shim nobody to call the wrapper.
    """
    directory = host.path(_TASKS)
    return sorted(
        bundle.name
        for bundle in (directory.iterdir() if directory.is_dir() else [])
        if WRAPPER in (host.read(f"{_TASKS}/{bundle.name}/options.json") or "")
        and _lives(host, bundle.name)
    )


def _lives(host: Host, identifier: str) -> bool:
    """``bootstrap.json`` says where the shim listens (containerd 2.0, core/runtime/v2)."""
    pid = (host.read(f"{_TASKS}/{identifier}/init.pid") or "").strip()
    if pid.isdecimal() and not host.path(f"/proc/{pid}").exists():
        return False
    try:
        said = json.loads(host.read(f"{_TASKS}/{identifier}/bootstrap.json") or "{}")
        address = str(said["address"])
    except (ValueError, KeyError, TypeError):
        return True
    return host.answers(address.removeprefix("unix://"))


def await_unused(host: Host, seconds: float) -> None:
    """Return when no container of ours is left, or when the time is over.

    The kubelet ends the sandbox of a pod that has moved away some time after the move.
    """
    deadline = time.monotonic() + seconds
    while in_use(host) and time.monotonic() < deadline:
        time.sleep(0.5)


def uninstall(host: Host, settings: Settings) -> None:
    """Undo ``install``; nothing of the product is left on the node.

    Raises ``InUse`` and leaves everything as it is while containers need the handler.
    """
    if found := in_use(host):
        raise InUse(tuple(found))
    manifest = _manifest(host)
    path = str(manifest.get("drop_in", settings.drop_in))
    host.remove(path)
    for directory in manifest.get("directories", []):
        host.remove_if_empty(directory)
    if host.knows_handler(settings.socket, HANDLER):
        host.run(*shlex.split(settings.restart))
    if plugin := manifest.get("plugin"):
        host.remove(plugin)
    for name, old in manifest.get("pipe_limits", {}).items():
        file = host.path(f"/proc/sys/fs/{name}")
        if int(file.read_text()) == _PIPE_LIMITS[name]:
            file.write_text(str(old))
    host.run("umount", "-R", "/run/godwit/store")
    # What an agent leaves for its successor: routes to addresses that have moved, tables of
    # nftables (what is not told about them), and cgroups.
    for family in ("-4", "-6"):
        words = (family, "route", "flush", "proto", str(ROUTE_PROTOCOL))
        host.run(f"{OPT}/criu/bin/ip", *words)
    nft = f"{OPT}/criu/bin/nft"
    for line in host.run(nft, "list", "tables").stdout.splitlines():
        _, family, name = line.split()
        if name.startswith(TABLES):
            host.run(nft, "delete", "table", family, name)
    for hierarchy in host.subdirectories("/sys/fs/cgroup"):
        for name in CGROUPS:
            host.remove_cgroup(f"{hierarchy}/{name}")
    for name in CGROUPS:
        host.remove_cgroup(f"/sys/fs/cgroup/{name}")
    # The last is CRIU's cache of what the kernel can do, which `criu check` has written.
    for made in ("/etc/godwit", "/var/lib/godwit", "/run/godwit", OPT, "/run/criu.kdat"):
        host.remove(made)
