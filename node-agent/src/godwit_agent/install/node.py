"""The steps that prepare a node, each idempotent, and their undoing."""

from __future__ import annotations

import json
import shlex
import socket
import time
from pathlib import Path

from godwit_agent.install.host import Host
from godwit_agent.install.runtime_config import (
    CNI_DIRECTORY,
    DROP_IN,
    Problem,
    RuntimeConfig,
    chain,
    drop_in,
    imports_drop_in,
    parse_dump,
    version_problem,
)

OPT = "/opt/godwit"
_MAIN_CONFIG = "/etc/containerd/config.toml"
_SOCKET = "/run/containerd/containerd.sock"
_MANIFEST = f"{OPT}/etc/installed.json"
# A lazy dump keeps all dirty pages in pipes; without CAP_SYS_RESOURCE root is bound by these
# limits too (pipe(7)).
_PIPE_LIMITS = {"pipe-user-pages-soft": 0, "pipe-max-size": 16_777_216}


def install(host: Host, payload: Path, restart: str) -> list[Problem]:
    """Prepare the node; returns everything that is in the way, having done what can be done."""
    problems: list[Problem] = []
    runc, containerd = host.which("runc"), host.which("containerd")
    if runc is None:
        problems.append(_missing("runc"))
    if containerd is None:
        return [*problems, _missing("containerd")]
    if problem := version_problem(host.run(containerd, "--version").stdout):
        return [*problems, problem]
    main_config = host.read(_MAIN_CONFIG) or ""
    if not imports_drop_in(main_config):
        problems.append(
            Problem(
                "NodeNotPrepared",
                f'{_MAIN_CONFIG} does not import drop-ins: add `imports = ["{Path(DROP_IN).parent}'
                '/*.toml"]` at its top and restart containerd',
            )
        )
    try:
        runtime = parse_dump(host.run(containerd, "config", "dump").stdout)
    except ValueError as error:
        return [*problems, Problem("NodeNotPrepared", f"containerd config dump: {error}")]
    made, network_problems = _chain(host, runtime)
    problems += network_problems
    if problems:
        return problems
    assert runc is not None
    assert made is not None
    _place_files(host, payload, runc, runtime)
    host.write(f"{CNI_DIRECTORY}/10-godwit.conflist", made)
    _raise_pipe_limits(host)
    if problem := _criu_problem(host):
        return [problem]
    changed = host.write(DROP_IN, drop_in(runtime))
    if (changed or "godwit" not in runtime.handlers) and (
        problem := _restart(host, restart, containerd)
    ):
        return [problem]
    return []


def _missing(program: str) -> Problem:
    return Problem("NodeNotPrepared", f"{program} is not installed on the node")


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


def _place_files(host: Host, payload: Path, runc: str, runtime: RuntimeConfig) -> None:
    for directory in ("/run/godwit", "/var/lib/godwit"):
        host.path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    for source in sorted(payload.rglob("*")):
        if source.is_file():
            mode = source.stat().st_mode & 0o755
            host.copy(source, f"{OPT}/{source.relative_to(payload)}", mode)
    host.link(f"{OPT}/bin/godwit-runc", "godwit-hook")
    host.link(f"{OPT}/gate/criu", "../bin/godwit-hook")
    host.write(f"{OPT}/etc/hook.json", json.dumps({"runtime": runc}) + "\n")
    plugin = f"{runtime.cni_bin_dirs[0]}/godwit"
    host.copy(payload / "bin/godwit-hook", plugin)
    host.write(_MANIFEST, json.dumps({"plugin": plugin}) + "\n")


def _raise_pipe_limits(host: Host) -> None:
    for name, wanted in _PIPE_LIMITS.items():
        file = host.path(f"/proc/sys/fs/{name}")
        current = int(file.read_text())
        if name == "pipe-max-size" and current >= wanted:
            continue
        if current != wanted:
            file.write_text(str(wanted))


def _criu_problem(host: Host) -> Problem | None:
    done = host.run(f"{OPT}/criu/criu", "check")
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
    return Problem("NodeNotPrepared", f"criu check: {'; '.join(lines[-3:]) or done.returncode}")


def _restart(host: Host, restart: str, containerd: str) -> Problem | None:
    """Restart containerd (its containers live on) and wait until it knows the handler."""
    done = host.run(*shlex.split(restart))
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        return Problem("NodeNotPrepared", f"`{restart}` failed: {said}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(host.path(_SOCKET)))
            dump = parse_dump(host.run(containerd, "config", "dump").stdout)
            if "godwit" in dump.handlers:
                return None
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    return Problem("NodeNotPrepared", "containerd did not come back with the handler in 60 s")


def uninstall(host: Host, restart: str) -> None:
    """Undo ``install``; nothing of the product is left on the node."""
    manifest = json.loads(host.read(_MANIFEST) or "{}")
    had_handler = host.path(DROP_IN).exists()
    host.remove(DROP_IN)
    if had_handler:
        host.run(*shlex.split(restart))
    if plugin := manifest.get("plugin"):
        host.remove(plugin)
    host.run("umount", "-R", "/run/godwit/store")
    for path in ("/etc/godwit", OPT, "/var/lib/godwit", "/run/godwit"):
        host.remove(path)
