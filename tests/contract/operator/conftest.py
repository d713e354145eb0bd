"""A real API server with controllers and scheduler, shared by this directory's tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from contract.operator.apiserver import ApiServer, missing
from godwit_operator.kube import HttpKubeApi, from_kubeconfig

_CLONE_NEWNET = 0x40000000
ROOT = Path(__file__).resolve().parents[3]


def _refuse_threads_outside(there: int) -> None:
    """gRPC opens sockets from its own threads, which a later setns leaves where they are."""
    names = {path.name: path for path in Path("/proc/self/task").iterdir()}
    names.pop(str(threading.get_native_id()))
    outside = [
        (path / "comm").read_text().strip()
        for path in names.values()
        if (path / "ns" / "net").stat().st_ino != there
    ]
    if any(name.startswith("grpc") for name in outside):
        pytest.fail(f"run tests/contract/operator in a process of its own: threads {outside}")


@contextlib.contextmanager
def inside(netns: str) -> Iterator[None]:
    """This thread in another network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    _refuse_threads_outside(os.fstat(there).st_ino)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        yield
    finally:
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)
        os.close(there)


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    why = missing()
    if why:
        pytest.skip(f"no real API server here: {why}")
    server = ApiServer(tmp_path_factory.mktemp("api"), f"godwit-api-{os.getpid()}")
    try:
        server.start()
        server.kubectl("apply", "-f", str(ROOT / "crds" / "podmigrations.yaml"))
        server.kubectl("wait", "--for=condition=established", "crd", "--all")
        server.controllers(
            "statefulset-controller",
            "replicaset-controller",
            "deployment-controller",
            "endpointslice-controller",
            "namespace-controller",
            "garbage-collector-controller",
            "persistentvolume-binder-controller",
        )
        server.scheduler()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def api(apiserver: ApiServer) -> AsyncIterator[HttpKubeApi]:
    with inside(apiserver.netns):
        api = HttpKubeApi(from_kubeconfig(apiserver.directory / "kubeconfig"))
        try:
            yield api
        finally:
            await api.close()
