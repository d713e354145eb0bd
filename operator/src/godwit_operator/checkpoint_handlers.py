"""kopf's handlers for PodCheckpoint and PodRestore: they only delegate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import kopf

from godwit_api.errors import GodwitError
from godwit_api.migration import GROUP, VERSION
from godwit_operator.checkpoint import ArchivePorts, CheckpointDriver
from godwit_operator.checkpoint_status import CHECKPOINTS, RESTORES, over
from godwit_operator.kube import NotFoundError, Resource
from godwit_operator.restore import RestoreDriver

log = logging.getLogger(__name__)
_DRIVERS: dict[Resource, type[CheckpointDriver] | type[RestoreDriver]] = {
    CHECKPOINTS: CheckpointDriver,
    RESTORES: RestoreDriver,
}


def under_way(status: Mapping[str, Any], **_: Any) -> bool:
    return not over(dict(status))


def register(handlers: kopf.OperatorRegistry, ports: Callable[[], ArchivePorts]) -> None:
    """One daemon per object; what it has begun it ends, also when the object is deleted."""
    for kind in _DRIVERS:
        _register(handlers, ports, kind)


def _register(
    handlers: kopf.OperatorRegistry, ports: Callable[[], ArchivePorts], kind: Resource
) -> None:
    @kopf.daemon(
        GROUP,
        VERSION,
        kind.plural,
        id=f"drive-{kind.plural}",
        registry=handlers,
        when=under_way,
        cancellation_polling=1.0,
    )
    async def drive(
        namespace: str | None, name: str, stopped: kopf.DaemonStopped, **_: Any
    ) -> None:
        if stopped:
            return
        try:
            item = await ports().api.get(kind, namespace, name)
            await _DRIVERS[kind](ports(), item).run()
        except NotFoundError:
            return
        except GodwitError as failure:
            log.warning("tried again", extra={"object": name, "cause": str(failure)})
            raise kopf.TemporaryError(str(failure), delay=2.0) from failure
