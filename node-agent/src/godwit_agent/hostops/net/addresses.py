"""Addresses of pods that have moved away: the IPAM of this node must not reissue them.

host-local keeps one file per address, ``<data dir>/<network>/<address>``, whose
first line is the sandbox that has it; ADD skips addresses that have a file, DEL
removes the files of its sandbox (containernetworking plugins, host-local's disk
backend). A held address keeps its file under a name that is no sandbox's; the
hook re-labels it when the sandbox goes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from collections.abc import Iterator

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HeldAddress, HostPath
from godwit_agent.hostops.smallfiles import make_directory, read_json, write_json

CNI_DIRECTORY = "/etc/godwit/cni/net.d"
_DEFAULT_DATA = "/var/lib/cni/networks"


def label(ip: str) -> str:
    """First line of the reservation of a held address."""
    return f"godwit-{ip}"


class HostAddresses:
    """The real ``Addresses``; ``cni_directory`` has the handler's chain."""

    def __init__(self, layout: Layout, cni_directory: str = CNI_DIRECTORY) -> None:
        self._layout = layout
        self._cni = layout.local(cni_directory)
        self._held = layout.local(layout.run_dir) / "held"
        make_directory(self._held)

    def _pools(self) -> Iterator[tuple[str, list[str]]]:
        """(reservation directory, subnets) of each host-local range of the handler's chain."""
        for file in sorted(self._cni.glob("*.conflist")):
            with contextlib.suppress(OSError, ValueError):
                chain = json.loads(file.read_text())
                for plugin in chain.get("plugins", []):
                    ipam = plugin.get("ipam", {})
                    if ipam.get("type") != "host-local":
                        continue
                    subnets = [one["subnet"] for group in ipam.get("ranges", []) for one in group]
                    subnets += [ipam["subnet"]] if "subnet" in ipam else []
                    data = ipam.get("dataDir", _DEFAULT_DATA)
                    yield f"{data}/{chain['name']}", subnets

    def subnets(self) -> tuple[str, ...]:
        """Subnets this node gives addresses from."""
        return tuple(subnet for _, subnets in self._pools() for subnet in subnets)

    def home(self, ip: str) -> bool:
        """Whether ``ip`` is one of this node's own addresses."""
        address = ipaddress.ip_address(ip)
        return any(address in ipaddress.ip_network(net, strict=False) for net in self.subnets())

    def hold(self, ip: str, pod_uid: str) -> None:
        """Keep ``ip`` reserved for the pod ``pod_uid``, whatever becomes of its sandbox here."""
        address = ipaddress.ip_address(ip)
        directories = []
        for directory, subnets in self._pools():
            if not any(address in ipaddress.ip_network(net, strict=False) for net in subnets):
                continue
            directories.append(directory)
            path = self._layout.local(f"{directory}/{ip}")
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "w") as file:
                    file.write(f"{label(ip)}\r\neth0")
        write_json(
            self._held / str(address),
            {"ip": ip, "pod_uid": pod_uid, "ipam_dirs": directories},
        )

    def release(self, ip: str) -> None:
        """The moved pod has ended: the address may be given out again."""
        value = read_json(self._held / str(ipaddress.ip_address(ip)))
        for directory in (value or {}).get("ipam_dirs", []):
            path = self._layout.local(f"{directory}/{ip}")
            with contextlib.suppress(OSError):
                if path.read_text().split("\r\n")[0].strip() == label(ip):
                    path.unlink()
        (self._held / str(ipaddress.ip_address(ip))).unlink(missing_ok=True)

    def list(self) -> tuple[HeldAddress, ...]:
        """All held addresses."""
        found = []
        for path in sorted(self._held.iterdir()):
            value = read_json(path)
            if value is not None:
                found.append(
                    HeldAddress(
                        ip=value["ip"],
                        pod_uid=value["pod_uid"],
                        ipam_dirs=tuple(HostPath(item) for item in value["ipam_dirs"]),
                    )
                )
        return tuple(found)
