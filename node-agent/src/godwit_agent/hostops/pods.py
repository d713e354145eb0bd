"""The runtime's state on disk: containerd's bundles and runc's state files.

containerd (core/runtime/v2, 2.1) keeps ``<tasks>/<id>/{config.json,init.pid,
options.json}``; runc 1.3 keeps ``<root>/<id>/state.json``. The annotations
``io.kubernetes.cri.*`` of a bundle name the pod.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from godwit_agent.hostops import procs
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Container, HostPath, Link, Mount, PodState, Sandbox
from godwit_agent.hostops.net.links import find_link
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

_PREFIX = "io.kubernetes.cri."
_STEP_S = 0.01
_UPPER = re.compile(r"(?:^|,)upperdir=((?:[^,\\]|\\.)*)")


class HostPods:
    """The real ``Pods`` for containerd."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def list(self) -> tuple[str, ...]:
        return tuple(
            str(bundle["annotations"].get(f"{_PREFIX}sandbox-uid", ""))
            for _, bundle in self._bundles(b'"sandbox"')
            if _kind(bundle) == "sandbox"
        )

    def find(self, pod_uid: str) -> PodState:
        mine = [
            (identifier, bundle)
            for identifier, bundle in self._bundles(pod_uid.encode())
            if bundle["annotations"].get(f"{_PREFIX}sandbox-uid") == pod_uid
        ]
        sandboxes = [item for item in mine if _kind(item[1]) == "sandbox"]
        if not sandboxes:
            raise Rejected(Reason.POD_NOT_FOUND, f"no pod {pod_uid} on this node")
        sandbox, annotations, link = self._sandbox(sandboxes)
        uppers = self._upper_dirs()
        containers = []
        for identifier, bundle in mine:
            in_sandbox = bundle["annotations"].get(f"{_PREFIX}sandbox-id") == sandbox.id
            if _kind(bundle) == "container" and in_sandbox:
                containers.append(self._container(identifier, bundle, uppers))
        return PodState(
            uid=pod_uid,
            namespace=str(annotations.get(f"{_PREFIX}sandbox-namespace", "")),
            name=str(annotations.get(f"{_PREFIX}sandbox-name", "")),
            sandbox=sandbox,
            containers=tuple(sorted(containers, key=lambda one: one.name)),
            link=link,
        )

    def ended(self, pod: PodState) -> tuple[str, ...]:
        return tuple(
            c.name
            for c in pod.containers
            if self._init_pid(c.id) != c.init_pid or procs.ends(c.init_pid)
        )

    def wait_forgotten(self, container_ids: Iterable[str], timeout_s: float) -> bool:
        """containerd removes a task's bundle after its shim has forgotten it (shimTask.delete,
        core/runtime/v2/shim.go, v2.1). Under CRI-O there is none."""
        tasks = self._layout.local(self._layout.tasks_dir)
        bundles = [tasks / identifier for identifier in container_ids]
        deadline = time.monotonic() + timeout_s
        while any(bundle.exists() for bundle in bundles):
            if time.monotonic() > deadline:
                return False
            time.sleep(_STEP_S)
        return True

    def _sandbox(
        self, found: Iterable[tuple[str, dict[str, Any]]]
    ) -> tuple[Sandbox, dict[str, Any], Link | None]:
        """The one that lives: the kubelet may have made a second after the first had failed."""
        for identifier, bundle in found:
            pid = self._init_pid(identifier)
            if not pid:
                continue
            if not self._is_ours(identifier):
                message = (
                    "the pod's runtimeClassName does not use the handler "
                    f"{self._layout.runtime_handler}: its runtime would not obey a guard"
                )
                raise Rejected(Reason.WRONG_RUNTIME_CLASS, message)
            netns = HostPath(f"/proc/{pid}/ns/net")
            try:
                inode = Path(netns).stat().st_ino
            except OSError:
                continue
            link = None
            with contextlib.suppress(GodwitError):
                link = find_link(netns, self._layout.host_netns)
            state = self._json(f"{self._layout.runc_root}/{identifier}/state.json") or {}
            cgroups = dict(state.get("cgroup_paths") or {})
            return Sandbox(identifier, pid, netns, inode, cgroups), bundle["annotations"], link
        raise Rejected(Reason.POD_NOT_RUNNING, "the pod's sandbox does not run")

    def _container(
        self, identifier: str, bundle: dict[str, Any], uppers: dict[str, str]
    ) -> Container:
        directory = f"{self._layout.tasks_dir}/{identifier}"
        root = str(bundle.get("root", {}).get("path", "rootfs"))
        rootfs = root if root.startswith("/") else f"{directory}/{root}"
        state = self._json(f"{self._layout.runc_root}/{identifier}/state.json") or {}
        upper = uppers.get(rootfs)
        return Container(
            id=identifier,
            name=str(bundle["annotations"].get(f"{_PREFIX}container-name", "")),
            init_pid=self._init_pid(identifier),
            bundle=HostPath(directory),
            runc_root=self._layout.runc_root,
            rootfs=HostPath(rootfs),
            upper_dir=HostPath(upper) if upper else None,
            cgroups=dict(state.get("cgroup_paths") or {}),
            external_descriptors=tuple(state.get("external_descriptors") or ()),
            mounts=tuple(_mount(entry) for entry in bundle.get("mounts", [])),
        )

    def _bundles(self, needle: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
        """(container id, config.json) of all bundles whose text contains ``needle``."""
        tasks = self._layout.local(self._layout.tasks_dir)
        for directory in sorted(tasks.iterdir()) if tasks.is_dir() else ():
            try:
                text = (directory / "config.json").read_bytes()
            except OSError:
                continue
            if needle not in text:
                continue
            with contextlib.suppress(ValueError):
                bundle = json.loads(text)
                if isinstance(bundle.get("annotations"), dict):
                    yield directory.name, bundle

    def _init_pid(self, identifier: str) -> int:
        """0 while there is none, or when it has ended."""
        path = self._layout.local(f"{self._layout.tasks_dir}/{identifier}/init.pid")
        try:
            pid = int(path.read_text())
        except (OSError, ValueError):
            return 0
        return pid if Path(f"/proc/{pid}").exists() else 0

    def _is_ours(self, identifier: str) -> bool:
        """Whether the shim calls our wrapper instead of the runtime itself."""
        options = self._json(f"{self._layout.tasks_dir}/{identifier}/options.json")
        return f"{self._layout.product_dir}/" in json.dumps(options)

    def _upper_dirs(self) -> dict[str, str]:
        """Mount point to upper directory of all overlays of the host."""
        found = {}
        for line in procs.lines(self._layout.host_pid, "mountinfo"):
            left, _, right = line.partition(" - ")
            if right.startswith("overlay ") and (match := _UPPER.search(right.split()[2])):
                found[procs.unescape(left.split()[4])] = procs.unescape(match[1])
        return found

    def _json(self, path: str) -> dict[str, Any] | None:
        try:
            value = json.loads(self._layout.local(path).read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def _kind(bundle: dict[str, Any]) -> str:
    return str(bundle["annotations"].get(f"{_PREFIX}container-type", ""))


def _mount(entry: dict[str, Any]) -> Mount:
    options = entry.get("options") or []
    bind = "bind" in options or "rbind" in options
    return Mount(
        destination=str(entry["destination"]),
        source=str(entry.get("source", "")),
        kind="bind" if bind else str(entry.get("type", "")),
        read_only="ro" in options,
    )
