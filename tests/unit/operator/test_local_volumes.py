"""What the API server has against another node of a PersistentVolume, as Checking hears it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_operator.kube import CLAIMS, VOLUMES, Resource
from godwit_operator.storage import storage_of
from godwit_operator.volumes import affinity_to, volume_obstacles

Object = dict[str, Any]
POD = msgspec.convert(
    {
        "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
        "spec": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]},
    },
    Pod,
)


class Server:
    """As much of the API as is asked for."""

    def __init__(self, answer: GodwitError | None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Object, bool]] = []

    async def list(self, kind: Resource, namespace: str | None = None) -> list[Object]:
        assert (kind, namespace) == (CLAIMS, "ns")
        return [{"metadata": {"name": "c"}, "spec": {"volumeName": "pv"}}]

    async def get(self, kind: Resource, namespace: str | None, name: str) -> Object:
        assert kind == VOLUMES
        spec = {"local": {"path": "/disk"}, "nodeAffinity": affinity_to("n1")}
        return {"metadata": {"name": name}, "spec": spec}

    async def patch(
        self, kind: Resource, namespace: str | None, name: str, body: Object, *, dry_run: bool
    ) -> Object:
        self.asked.append((name, body, dry_run))
        if self.answer:
            raise self.answer
        return body


async def test_a_volume_that_may_be_told_another_node() -> None:
    server = Server(None)
    storage = await storage_of(server, POD)  # type: ignore[arg-type]
    assert volume_obstacles(POD, storage, ["v"]) == []
    ((name, body, dry_run),) = server.asked
    assert (name, dry_run) == ("pv", True)
    assert body["spec"]["nodeAffinity"] != affinity_to("n1")


async def test_one_that_may_not_is_refused_with_what_the_api_server_said() -> None:
    server = Server(Rejected(Reason.MALFORMED, "PATCH …: 422 field is immutable"))
    storage = await storage_of(server, POD)  # type: ignore[arg-type]
    for copied in ([], ["v"]):
        (found,) = volume_obstacles(POD, storage, copied)
        assert "MutablePVNodeAffinity" in found.message
        assert "field is immutable" in found.message


async def test_an_api_server_that_does_not_answer_has_said_nothing() -> None:
    with pytest.raises(Retryable):
        await storage_of(Server(Retryable(Reason.API_UNAVAILABLE, "away")), POD)  # type: ignore[arg-type]
