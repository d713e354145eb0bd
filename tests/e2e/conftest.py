"""Two real clusters with Godwit on them; a run of one half of the tests needs but one.

``routed``: three nodes, each pod on a link of its own (ptp). ``bridged``: two nodes whose pods
share a bridge; tests with the mark of that name use it, and uninstall there at the end.

The first is installed with failpoints, which do nothing but where a test asks for it.

``GODWIT_E2E_KEEP=1`` leaves the routed one standing for the next run; a standing cluster is
reused (images and chart are brought up to date). ``GODWIT_E2E_AS_IS=1`` takes a
standing one with the images it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from e2e.support import Scene
from e2e.traces import Bridged, traces
from lab.cluster import Cluster
from lab.debris import wait_clean


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: item.path.stem == "test_second_cluster")


@pytest.fixture(scope="session")
def routed() -> Iterator[Cluster]:
    handle = Cluster(os.environ.get("GODWIT_TESTBED", "e2e"))
    if os.environ.get("GODWIT_E2E_AS_IS"):
        yield handle
        return
    handle.up(nodes=int(os.environ.get("GODWIT_E2E_NODES", "3")))
    handle.build_images()
    handle.install("failpoints=true")
    yield handle
    left = wait_clean(handle, handle.ready_nodes(), 150)
    assert not left, left
    if not os.environ.get("GODWIT_E2E_KEEP"):
        handle.down()


@pytest.fixture(scope="session")
def bridged() -> Iterator[Bridged]:
    name = os.environ.get("GODWIT_TESTBED", "e2e")
    handle = Cluster(f"{name}-bridge", tag=name)
    try:
        handle.up(nodes=2, cni="bridge")
        before = traces(handle)
        handle.build_images()
        handle.install()
        yield Bridged(handle, before)
    finally:
        handle.down()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The one that a module's tests run on."""
    if request.node.get_closest_marker("bridged"):
        made: Bridged = request.getfixturevalue("bridged")
        return made.cluster
    handle: Cluster = request.getfixturevalue("routed")
    return handle


@pytest.fixture
def scene(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A namespace of its own."""
    made = Scene(cluster, request.node.name)
    made.open()
    yield made
    made.close()
