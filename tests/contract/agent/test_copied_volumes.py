"""Volumes that are directories of the node: what a target is asked, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fakes.cluster import TIMEOUT, Cluster
from fakes.cluster import cluster as make_cluster
from godwit_agent.hostops.model import HostPath
from godwit_api.errors import Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_api.wire import error_of

DATA = HostPath("/srv/data")
VOLUMES = (pb.CopiedVolume(name="data", path=DATA),)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for made in make_cluster(tmp_path):
        made.a.fake.directories[DATA] = True
        yield made


def ready(cluster: Cluster) -> None:
    cluster.prepare(volumes=VOLUMES)
    cluster.copy(volumes=VOLUMES)
    cluster.hand_over()


def test_what_was_copied_stays_on_both_nodes(cluster: Cluster) -> None:
    ready(cluster)
    assert cluster.switch().committed
    cluster.finish()
    assert DATA in cluster.a.fake.directories
    assert DATA in cluster.b.fake.directories
    assert "b.remove_volume" not in cluster.world.effects


def test_a_migration_that_is_given_up_takes_it_away(cluster: Cluster) -> None:
    ready(cluster)
    cluster.abort_source(lift_guard=True)
    cluster.abort_target()
    assert DATA not in cluster.b.fake.directories
    assert cluster.a.fake.directories[DATA]


def test_also_after_a_restart_of_the_target(cluster: Cluster) -> None:
    ready(cluster)
    cluster.b.stop()
    cluster.b.start()
    cluster.world.fail["b.remove_volume"] = Retryable(Reason.COPY_FAILED, "busy")
    with pytest.raises(grpc.RpcError):
        cluster.abort_target()
    del cluster.world.fail["b.remove_volume"]
    cluster.abort_target()
    assert DATA not in cluster.b.fake.directories
    assert cluster.b.steps() == ["Aborted"]


def test_a_source_that_was_restarted_copies_it_again(cluster: Cluster) -> None:
    """The stream is lost with the process: the switch copies everything once more."""
    ready(cluster)
    cluster.a.stop()
    cluster.a.start()
    cluster.world.effects.clear()
    assert cluster.switch().committed
    assert f"a.read {DATA}" in cluster.world.effects


def test_what_is_there_is_not_touched(cluster: Cluster) -> None:
    cluster.b.fake.directories[DATA] = True
    request = pb.CheckTargetRequest(
        migration=cluster.ref(),
        pod=cluster.pod(),
        source=cluster.a.peer(),
        source_report=cluster.a.api.GetNode(pb.GetNodeRequest(), timeout=TIMEOUT),
        volumes=VOLUMES,
    )
    (found,) = cluster.b.api.CheckTarget(request, timeout=TIMEOUT).obstacles
    assert "not empty" in found.message
    with pytest.raises(grpc.RpcError) as caught:
        cluster.prepare(volumes=VOLUMES)
    assert error_of(caught.value).reason is Reason.VOLUME_CANNOT_FOLLOW
    assert "b.make_volume" not in cluster.world.effects


def test_the_source_node_itself_takes_none(cluster: Cluster) -> None:
    """Its directory is empty now: giving up would remove what the pod writes meanwhile."""
    cluster.a.fake.directories[DATA] = False
    with pytest.raises(grpc.RpcError) as caught:
        cluster.prepare(target=cluster.a, volumes=VOLUMES)
    assert error_of(caught.value).reason is Reason.VOLUME_CANNOT_FOLLOW


def test_a_source_says_what_it_lacks(cluster: Cluster) -> None:
    volumes = (*VOLUMES, pb.CopiedVolume(name="other", path="/srv/other"))
    request = pb.CheckSourceRequest(migration=cluster.ref(), pod=cluster.pod(), volumes=volumes)
    (found,) = cluster.a.api.CheckSource(request, timeout=TIMEOUT).obstacles
    assert found.reason == Reason.VOLUME_CANNOT_FOLLOW
    assert "other" in found.message


@pytest.mark.parametrize(
    "paths",
    [("srv",), ("/",), ("/srv/../etc",), ("/srv//x",), ("/srv/",), ("/srv", "/srv/data")],
)
def test_paths_that_are_not_plain(cluster: Cluster, paths: tuple[str, ...]) -> None:
    volumes = tuple(pb.CopiedVolume(name=f"v{n}", path=path) for n, path in enumerate(paths))
    with pytest.raises(grpc.RpcError) as caught:
        cluster.prepare(volumes=volumes)
    assert error_of(caught.value).reason is Reason.MALFORMED
