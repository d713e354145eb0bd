"""All real ports of one node, put together."""

from __future__ import annotations

import json
from dataclasses import replace

from godwit_agent.config import Config
from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.copies import HostCopies
from godwit_agent.hostops.criu.dump import HostDumps
from godwit_agent.hostops.criu.restore import HostRestores
from godwit_agent.hostops.files.volumes import HostVolumes
from godwit_agent.hostops.hooks import HookFiles
from godwit_agent.hostops.inspector import HostInspector
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath
from godwit_agent.hostops.net.addresses import HostAddresses
from godwit_agent.hostops.net.connections import HostConnections
from godwit_agent.hostops.net.datagrams import HostDatagrams
from godwit_agent.hostops.net.network import HostNetworks
from godwit_agent.hostops.net.routes import HostRoutes
from godwit_agent.hostops.pods import HostPods
from godwit_agent.hostops.ports import Host
from godwit_agent.hostops.probe import HostProbe
from godwit_agent.hostops.store import HostStores
from godwit_agent.hostops.throttle import HostThrottles


def real_host(config: Config) -> Host:
    """The host that this agent runs on."""
    layout = _with_runtime(Layout(run_dir=HostPath(str(config.run_dir))))
    addresses = HostAddresses(layout)
    probe = HostProbe(layout, addresses)
    hooks = HookFiles(layout)
    if not config.failpoints:
        hooks.forget_failpoints()
    return Host(
        pods=HostPods(layout),
        inspector=HostInspector(layout),
        probe=probe,
        cgroups=HostCgroups(layout),
        throttles=HostThrottles(layout),
        copies=HostCopies(layout),
        dumps=HostDumps(layout, hooks),
        stores=HostStores(layout),
        volumes=HostVolumes(layout),
        restores=HostRestores(layout, hooks),
        hooks=hooks,
        networks=HostNetworks(layout),
        datagrams=HostDatagrams(),
        routes=HostRoutes(layout),
        addresses=addresses,
        connections=HostConnections(layout),
    )


def _with_runtime(layout: Layout) -> Layout:
    """The runtime that the installer had found on this node; the hook calls the same."""
    try:
        value = json.loads(layout.local(f"{layout.product_dir}/etc/hook.json").read_bytes())
        return replace(layout, runc=str(value["runtime"]))
    except (OSError, ValueError, KeyError, TypeError):
        return layout
