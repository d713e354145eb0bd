"""One real cluster of three nodes with Godwit on it, for all end-to-end tests.

``GODWIT_E2E_KEEP=1`` leaves it standing for the next run; a standing cluster is
reused (images and chart are brought up to date). ``GODWIT_E2E_AS_IS=1`` takes a
standing one with the images it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from e2e.support import Scene
from lab.cluster import Cluster
from lab.debris import wait_clean


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    handle = Cluster(os.environ.get("GODWIT_TESTBED", "e2e"))
    if os.environ.get("GODWIT_E2E_AS_IS"):
        yield handle
        return
    handle.up(nodes=int(os.environ.get("GODWIT_E2E_NODES", "3")))
    handle.build_images()
    handle.install()
    yield handle
    left = wait_clean(handle, handle.ready_nodes(), 150)
    assert not left, left
    if not os.environ.get("GODWIT_E2E_KEEP"):
        handle.down()


@pytest.fixture
def scene(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A namespace of its own."""
    made = Scene(cluster, request.node.name)
    made.open()
    yield made
    made.close()
