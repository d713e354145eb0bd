"""Where things are: the cache (kept), the state of a testbed (removed by ``down``)."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("GODWIT_TESTBED_CACHE", "/var/cache/godwit/testbed"))
RUN = Path("/run/godwit-testbed")
DATA = Path("/var/lib/godwit-testbed")


class TestbedError(Exception):
    """Something a person can act on; the message names the object and the way out."""

    __test__ = False  # not a test class, whatever its name looks like to pytest


@dataclass(frozen=True)
class Place:
    """Names and directories of one testbed; all of it follows from its name and index."""

    name: str
    index: int

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def run(self) -> Path:
        """Small state: pid files, keys, kubeconfigs (tmpfs, 0700)."""
        return RUN / self.name

    @property
    def data(self) -> Path:
        """Bulk state: overlay directories, container images, logs (disk)."""
        return DATA / self.name

    @property
    def network(self) -> str:
        """First two bytes of every address of this testbed."""
        return f"10.{128 + self.index}"

    @property
    def api_address(self) -> str:
        """Address of the control plane."""
        return f"{self.network}.0.10"

    @property
    def pod_cidr(self) -> str:
        """All pods of the cluster."""
        return f"{self.network}.128.0/17"

    @property
    def service_cidr(self) -> str:
        """All ClusterIPs."""
        return f"{self.network}.64.0/20"

    @property
    def network6(self) -> str:
        """First 48 bits of every IPv6 address of a dual-stack testbed."""
        return f"fd67:7765:{self.index:x}"

    @property
    def pod_cidr6(self) -> str:
        """All pods of a dual-stack cluster."""
        return f"{self.network6}:80::/57"

    @property
    def service_cidr6(self) -> str:
        """All IPv6 ClusterIPs of a dual-stack cluster."""
        return f"{self.network6}:40::/112"

    @property
    def dns_address(self) -> str:
        """ClusterIP of CoreDNS."""
        return f"{self.network}.64.10"

    def netns(self, place: str) -> str:
        """Name of a network namespace (``ext``, ``cp``, ``n1`` …)."""
        return f"gtb-{self.name}-{place}"

    @property
    def cgroup(self) -> str:
        """Directory below each cgroup hierarchy."""
        return f"godwit-testbed-{self.name}"

    def kubeconfig(self, user: str = "admin") -> Path:
        """Kubeconfig of a component or of the administrator."""
        return self.run / "kubeconfig" / f"{user}.conf"


def check_name(name: str) -> None:
    """Refuse names that cannot be part of a path, a cgroup or a namespace name."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", name):
        raise TestbedError(
            f"testbed name {name!r}: use up to 20 lower-case letters, digits and dashes"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock for as long as the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def place(name: str, *, create: bool = False) -> Place:
    """The testbed called ``name``; a new one takes the lowest free index (0 to 99)."""
    check_name(name)
    index_file = RUN / name / "index"
    if index_file.exists():
        return Place(name, int(index_file.read_text()))
    if not create:
        raise TestbedError(f"there is no testbed {name!r}; `testbed up --name {name}` makes it")
    with locked(RUN / ".lock"):
        taken = {int(file.read_text()) for file in RUN.glob("*/index")}
        index = next(number for number in range(100) if number not in taken)
        (RUN / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        index_file.write_text(str(index))
    return Place(name, index)


def names() -> list[str]:
    """Every testbed that has left a trace."""
    found = {file.name for base in (RUN, DATA) if base.is_dir() for file in base.iterdir()}
    return sorted(name for name in found if not name.startswith("."))
