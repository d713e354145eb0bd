"""What the target agent is told of a successor's containers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from godwit_agent.server import decode
from godwit_api.errors import Rejected
from godwit_api.migration import PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Pod
from godwit_operator.successor import expectation

MIGRATION = msgspec.convert(
    {
        "metadata": {"name": "m", "namespace": "n", "uid": "u"},
        "spec": {"podName": "p"},
        "status": {"epoch": 2, "successorName": "p", "successorUID": "s", "podIP": "10.0.0.1"},
    },
    PodMigration,
)


def pod(**spec: Any) -> Pod:
    return msgspec.convert({"metadata": {"name": "p"}, "spec": spec}, Pod)


def _exec(*command: str) -> dict[str, Any]:
    return {"exec": {"command": list(command)}}


def test_commands_and_done_containers() -> None:
    request = expectation(
        MIGRATION,
        pod(
            initContainers=[
                {"name": "first", "lifecycle": {}},
                {"name": "proxy", "restartPolicy": "Always", "startupProbe": _exec("up", "?")},
                {"name": "second"},
            ],
            containers=[
                {"name": "app", "lifecycle": {"postStart": _exec("warm")}},
                {"name": "web", "startupProbe": {"httpGet": {"port": 1}}},
                {"name": "plain"},
            ],
        ),
    )
    assert (request.migration.epoch, request.pod.uid) == (2, "s")
    assert list(request.done) == ["first", "second"]
    plan = decode.plan(request)
    assert plan.done == ("first", "second")
    assert plan.post_start == {"proxy": (), "app": ("warm",), "web": ()}
    assert plan.startup == {"proxy": ("up", "?"), "app": (), "web": ()}


@pytest.mark.parametrize(
    "request_",
    [
        pb.ExpectPodRequest(done=["../x"]),
        pb.ExpectPodRequest(done=["x"] * 65),
        pb.ExpectPodRequest(commands=[pb.Commands(container="x/y")]),
        pb.ExpectPodRequest(commands=[pb.Commands(container="x", startup=["x" * (1 << 20)])]),
    ],
)
def test_what_the_agent_does_not_take(request_: pb.ExpectPodRequest) -> None:
    with pytest.raises(Rejected):
        decode.plan(request_)
