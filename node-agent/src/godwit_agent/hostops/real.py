"""All real ports of one node, put together."""

from __future__ import annotations

from collections.abc import Callable

from godwit_agent.config import Config
from godwit_agent.hostops.addresses import HostAddresses
from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.dump import HostDumps
from godwit_agent.hostops.hooks import HookFiles
from godwit_agent.hostops.inspector import HostInspector
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.memory import HostSourceMemory
from godwit_agent.hostops.model import HostPath, PodState, RoundStats, Tracking
from godwit_agent.hostops.network import HostNetworks
from godwit_agent.hostops.pods import HostPods
from godwit_agent.hostops.ports import CopySink, Host, SourceFiles, SourceMemory
from godwit_agent.hostops.probe import HostProbe
from godwit_agent.hostops.restore import HostRestores
from godwit_agent.hostops.routes import HostRoutes
from godwit_agent.hostops.store import HostStores


class HostCopies:
    """The real ``Copies``."""

    def __init__(self, kind: Tracking) -> None:
        self._kind = kind

    def memory(self, pod: PodState) -> SourceMemory:
        return HostSourceMemory(pod, self._kind)

    def files(self, pod: PodState) -> SourceFiles:
        return _NoFiles()


class _NoFiles:
    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        return RoundStats(dirty_bytes=0, copied_bytes=0, duration_us=0, since_us=0)

    def final(self, sink: CopySink) -> RoundStats:
        return self.round(sink)

    def close(self) -> None: ...


def real_host(config: Config) -> Host:
    """The host that this agent runs on."""
    layout = Layout(run_dir=HostPath(str(config.run_dir)))
    addresses = HostAddresses(layout)
    probe = HostProbe(layout, addresses)
    hooks = HookFiles(layout)
    return Host(
        pods=HostPods(layout),
        inspector=HostInspector(layout),
        probe=probe,
        cgroups=HostCgroups(layout),
        copies=HostCopies(probe.facts().tracking),
        dumps=HostDumps(layout, hooks),
        stores=HostStores(layout),
        restores=HostRestores(layout, hooks),
        hooks=hooks,
        networks=HostNetworks(layout),
        routes=HostRoutes(layout),
        addresses=addresses,
    )
