"""The operator's process, with its own permissions, certificates and kopf."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml

from contract.operator import operatorprocess
from contract.operator.agentserver import enroll, request_for, serve_agent
from contract.operator.apiserver import ADDRESS, URL, ApiServer
from contract.operator.test_moves import Scene, on_a_local_volume, other, scene
from contract.operator.world import NODE_NAMES, FakeAgent
from godwit_operator.kube import CONFIG_MAPS, MIGRATIONS, PODS, HttpKubeApi, find

__all__ = ["scene"]  # the fixture
pytestmark = pytest.mark.host
ROOT = Path(__file__).resolve().parents[3]
SYSTEM = "godwit-system"
VOLUMES_ROLE = "godwit-operator-local-volumes"


class Process:
    """``python -m godwit_operator`` in the API server's network namespace."""

    def __init__(self, server: ApiServer, kubeconfig: Path, log: Path) -> None:
        self._server, self._kubeconfig, self._log = server, kubeconfig, log
        self._process: BaseProcess | None = None

    def start(self) -> None:
        environment = os.environ | {
            "KUBECONFIG": str(self._kubeconfig),
            "GODWIT_ADDRESS_SECONDS": "1",
            "GODWIT_HOUSEKEEPING_SECONDS": "1",
        }
        for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):  # as in the container
            environment.pop(name, None)
        self._process = operatorprocess.start(environment, self._log)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()

    def ended(self) -> int | None:
        """Its exit code, once there is one."""
        return self._process.exitcode if self._process else None

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        self._process.join(20)
        assert self._process.exitcode is not None
        return self._process.exitcode


def _kubeconfig(server: ApiServer, path: Path, token: str) -> None:
    authority = (server.directory / "ca.crt").read_bytes()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [
            {
                "name": "x",
                "cluster": {
                    "server": URL,
                    "certificate-authority-data": base64.b64encode(authority).decode(),
                },
            }
        ],
        "users": [{"name": "x", "user": {"token": token}}],
    }
    path.write_text(yaml.safe_dump(config))


async def _until(what: Any, seconds: float = 20.0) -> Any:
    for _ in range(int(seconds * 20)):
        found = await what()
        if found:
            return found
        await asyncio.sleep(0.05)
    raise TimeoutError(what)


@pytest.fixture
async def process(apiserver: ApiServer, scene: Scene, tmp_path: Path) -> AsyncIterator[Process]:
    kubectl = apiserver.kubectl
    with contextlib.suppress(RuntimeError):
        kubectl("create", "namespace", SYSTEM)
        kubectl("create", "serviceaccount", "godwit-node-agent", "-n", SYSTEM)
    kubectl("apply", "-f", str(ROOT / "operator" / "rbac.yaml"))
    token = kubectl("create", "token", "godwit-operator", "-n", SYSTEM)
    _kubeconfig(apiserver, tmp_path / "kubeconfig", token)
    process = Process(apiserver, tmp_path / "kubeconfig", tmp_path / "operator.log")
    process.start()
    servers = []
    try:
        for index, name in enumerate(NODE_NAMES, 1):
            servers.append(await _agent(apiserver, scene, name, f"10.255.1.{index}"))
        yield process
    finally:
        process.stop()
        print((tmp_path / "operator.log").read_text())
        for server in servers:
            await server.stop(None)


def may_change_volumes(apiserver: ApiServer) -> None:
    """What the chart's ``localVolumes.move`` gives."""
    role = ("--verb=patch", "--resource=persistentvolumes")
    account = (f"--clusterrole={VOLUMES_ROLE}", f"--serviceaccount={SYSTEM}:godwit-operator")
    for kind, options in (("clusterrole", role), ("clusterrolebinding", account)):
        with contextlib.suppress(RuntimeError):  # it is there
            apiserver.kubectl("create", kind, VOLUMES_ROLE, *options)


async def _agent(apiserver: ApiServer, scene: Scene, name: str, address: str) -> Any:
    """One node's agent: pod, token, certificate, server."""
    apiserver.inside(["ip", "address", "replace", f"{address}/32", "dev", "lo"])
    api = scene.api
    pod = f"agent-{name}"
    body = {
        "metadata": {"name": pod, "labels": {"app.kubernetes.io/component": "node-agent"}},
        "spec": {
            "nodeName": name,
            "serviceAccountName": "godwit-node-agent",
            "containers": [{"name": "agent", "image": "x"}],
        },
    }
    if await find(api, PODS, SYSTEM, pod) is None:
        await api.create(PODS, SYSTEM, body)
    status = {"phase": "Running", "hostIP": address, "hostIPs": [{"ip": address}]}
    await api.patch(PODS, SYSTEM, pod, {"status": status}, sub="status")
    published = await _until(lambda: find(api, CONFIG_MAPS, SYSTEM, "godwit-ca"))
    authority = published["data"]["ca.crt"].encode()
    token = apiserver.kubectl(
        *("create", "token", "godwit-node-agent", "-n", SYSTEM, "--audience", "godwit-operator"),
        *("--bound-object-kind", "Pod", "--bound-object-name", pod),
    )
    key, csr = request_for("somebody.else")

    async def answer() -> Any:
        try:
            return await enroll("127.0.0.1:9462", authority, csr, token)
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                return None
            raise

    return await serve_agent(
        FakeAgent(scene.world, name), f"{address}:9460", key, await _until(answer)
    )


async def _final(api: HttpKubeApi, namespace: str, name: str = "m") -> dict[str, Any]:
    async def ended() -> Any:
        found = await find(api, MIGRATIONS, namespace, name)
        phase = (found or {}).get("status", {}).get("phase")
        return found if phase in {"Succeeded", "Aborted", "Rejected", "Stalled"} else None

    found: dict[str, Any] = await _until(ended, 40)
    return found


async def _apply(scene: Scene, pod: str, target: str, **more: object) -> None:
    body = {
        "apiVersion": "godwit.io/v1alpha1",
        "kind": "PodMigration",
        "metadata": {"name": "m"},
        "spec": {"podName": pod, "target": {"nodeName": target}, **more},
    }
    await scene.api.create(MIGRATIONS, scene.namespace, body)


async def test_an_operator_that_may_not_change_volumes_says_so(
    scene: Scene, process: Process, apiserver: ApiServer
) -> None:
    apiserver.kubectl("delete", "clusterrolebinding", VOLUMES_ROLE, "--ignore-not-found")
    await on_a_local_volume(scene, "StatefulSet", "n2")
    await _apply(scene, "redis-0", "n3", copyVolumes=["data"])
    status = (await _final(scene.api, scene.namespace))["status"]
    assert status["phase"] == "Rejected", status
    (obstacle,) = status["obstacles"]
    assert "localVolumes.move" in obstacle["message"]
    assert "forbidden" in obstacle["message"]


@pytest.mark.parametrize("kind", ["StatefulSet", "Pod"])
async def test_move(scene: Scene, process: Process, kind: str) -> None:
    pod = await scene.workload(kind)
    target = other(pod)
    await _apply(scene, pod["metadata"]["name"], target)
    found = await _final(scene.api, scene.namespace)
    assert found["status"]["phase"] == "Succeeded", found["status"]
    assert scene.world.running_on == target

    async def without_finalizer() -> bool:
        seen = await scene.api.get(MIGRATIONS, scene.namespace, "m")
        return not seen["metadata"].get("finalizers")

    await _until(without_finalizer)
    await scene.nothing_left(found["metadata"]["uid"])


async def test_delete_cancels(scene: Scene, process: Process) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.copy_gate = asyncio.Event()
    await _apply(scene, "redis-0", other(pod))

    async def copying() -> bool:
        seen = await scene.api.get(MIGRATIONS, scene.namespace, "m")
        return bool(seen.get("status", {}).get("phase") == "Copying")

    await _until(copying)
    await scene.api.delete(MIGRATIONS, scene.namespace, "m")

    async def gone() -> bool:
        return await find(scene.api, MIGRATIONS, scene.namespace, "m") is None

    await _until(gone)
    after = await scene.ready_pod()
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
    assert ("n1", "abort_source_lift", 1) in [
        ("n1", call, epoch) for _, call, epoch in scene.world.calls
    ]


async def test_operator_dies_in_the_handover(scene: Scene, process: Process) -> None:
    pod = await scene.workload("StatefulSet")
    target = other(pod)
    await _apply(scene, "redis-0", target)

    async def handing_over() -> bool:
        seen = await scene.api.get(MIGRATIONS, scene.namespace, "m")
        return bool(seen.get("status", {}).get("phase") == "HandingOver")

    await _until(handing_over)
    process.kill()
    await asyncio.sleep(0.5)
    process.start()
    found = await _final(scene.api, scene.namespace)
    assert found["status"]["phase"] == "Succeeded", found["status"]
    assert scene.world.running_on == target


async def test_enrolment_refuses_other_tokens(
    scene: Scene, process: Process, apiserver: ApiServer
) -> None:
    published = await scene.api.get(CONFIG_MAPS, SYSTEM, "godwit-ca")
    authority = published["data"]["ca.crt"].encode()
    _, csr = request_for("n1.node.godwit.internal")
    tokens = {
        "unbound": ("godwit-node-agent", "--audience", "godwit-operator"),
        "other account": ("godwit-operator", "--audience", "godwit-operator"),
        "other audience": ("godwit-node-agent",),
    }
    for words in tokens.values():
        token = apiserver.kubectl("create", "token", "-n", SYSTEM, *words)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await enroll(f"{ADDRESS}:9462", authority, csr, token)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_refused_ones_give_their_place_back(scene: Scene, process: Process) -> None:
    """kopf ends the daemon of an object whose phase is final before the daemon looks again."""
    for number in range(4):  # more than a node takes at once
        body = {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": "PodMigration",
            "metadata": {"name": f"m{number}"},
            "spec": {"podName": "nobody", "target": {"nodeName": "n2"}},
        }
        await scene.api.create(MIGRATIONS, scene.namespace, body)
        found = await _final(scene.api, scene.namespace, f"m{number}")
        assert [o["reason"] for o in found["status"]["obstacles"]] == ["PodNotFound"]
