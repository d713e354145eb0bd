"""The source's side of a copy (``Copies``)."""

from __future__ import annotations

import functools

from godwit_agent.hostops.cgroups import HostCgroups
from godwit_agent.hostops.criu import survive
from godwit_agent.hostops.files.filesource import HostSourceFiles
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import PodState, Tracking
from godwit_agent.hostops.pages import tracking
from godwit_agent.hostops.pages.frozen import HostFrozenMemory
from godwit_agent.hostops.pages.injector import Injector
from godwit_agent.hostops.pages.memory import HostSourceMemory
from godwit_agent.hostops.pages.pagescan import Scanner


@functools.cache
def best_tracking() -> Tracking:
    """What this kernel can do; probed once."""
    return tracking.probe(Scanner())


class HostCopies:
    """The real ``Copies``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def memory(self, pod: PodState) -> HostSourceMemory:
        injector = Injector(functools.partial(survive.detach, self._layout))
        return HostSourceMemory(pod, best_tracking(), injector)

    def frozen(self, pod: PodState) -> HostFrozenMemory:
        return HostFrozenMemory(pod, HostCgroups(self._layout))

    def files(self, pod: PodState) -> HostSourceFiles:
        return HostSourceFiles(self._layout, pod)
