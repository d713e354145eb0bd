"""A copy runs before all of its memory is there: the source stands until it is, whatever fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from fakes.cluster import MIGRATION, SUCCESSOR, TIMEOUT, Cluster
from fakes.cluster import cluster as make_cluster
from fakes.host import AWAY, PAGE
from godwit_agent.hostops.model import Piece
from godwit_agent.hostops.ports import Serving
from godwit_api.errors import Aborted, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_api.wire import error_of

PAGES = 40


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for made in make_cluster(tmp_path):
        made.a.fake.withholds = PAGES
        yield made


def until(done: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def refusal(call: Callable[[], object]) -> Reason:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return error_of(caught.value).reason


def cut(cluster: Cluster) -> None:
    """No page leaves the source."""
    cluster.world.fail["a.read_pages"] = Retryable(Reason.COPY_FAILED, "the link is down")


def mend(cluster: Cluster) -> None:
    cluster.world.fail.clear()


def switch_with_the_link_cut(cluster: Cluster) -> pb.SwitchResponse:
    cluster.ready()
    cut(cluster)
    got = cluster.switch(post_copy=True)
    assert got.committed, got
    assert cluster.b.fake.running
    return got


def target(cluster: Cluster) -> pb.MigrationRecord:
    request = pb.GetMigrationRequest(uid=MIGRATION)
    records = cluster.b.api.GetMigration(request, timeout=TIMEOUT).records
    (record,) = (one for one in records if one.role == pb.ROLE_TARGET)
    return record


def missing(cluster: Cluster) -> set[int]:
    return cluster.b.fake.stores_here[MIGRATION].away.pages


def comes_to_its_end(cluster: Cluster) -> None:
    until(lambda: target(cluster).step == "Arrived")
    assert not missing(cluster)
    until(lambda: "a.kill" in cluster.world.effects)
    last_read = len(cluster.world.effects) - cluster.world.effects[::-1].index("a.read_pages")
    assert cluster.world.index("a.kill") >= last_read
    until(lambda: cluster.a.steps()[-1:] == ["Arrived"])
    cluster.finish()
    assert cluster.a.steps() == ["Finished"]
    assert not cluster.b.fake.stores_here
    assert not cluster.b.fake.aborted_slots


def test_the_source_stands_until_every_page_has_come(cluster: Cluster) -> None:
    got = switch_with_the_link_cut(cluster)
    assert got.missing_bytes == PAGES * len(PAGE) == target(cluster).missing_bytes
    assert cluster.a.steps() == ["Running"]
    assert refusal(cluster.finish) is Reason.IN_PROGRESS
    request = pb.FinishTargetRequest(migration=cluster.ref())
    finish_target = cluster.b.api.FinishTarget
    assert refusal(lambda: finish_target(request, timeout=TIMEOUT)) is Reason.IN_PROGRESS
    assert "a.kill" not in cluster.world.effects
    assert cluster.world.effects.count("a.freeze") == 2, "CRIU alone holds it"
    mend(cluster)
    comes_to_its_end(cluster)
    assert "a.thaw" not in cluster.world.effects


def test_nothing_is_withheld_unasked(cluster: Cluster) -> None:
    cluster.ready()
    got = cluster.switch()
    assert got.committed
    assert got.missing_bytes == 0
    assert "a.read_pages" not in cluster.world.effects
    assert "a.kill" in cluster.world.effects
    cluster.finish()


def test_a_target_that_was_not_told_refuses_what_is_not_complete(cluster: Cluster) -> None:
    cluster.ready()
    store = cluster.b.fake.stores_here[MIGRATION]
    store.got += [("image", "app", "core-1.img", b"core"), ("file", "app", b"withheld", b"3")]
    channel, stub = cluster.b.peer_stub(cluster.a.identity)
    with channel:
        stub.Arm(pb.ArmRequest(migration=cluster.ref()), timeout=TIMEOUT)
        request = pb.RestoreRequest(migration=cluster.ref())
        assert refusal(lambda: stub.Restore(request, timeout=TIMEOUT)) is Reason.VERIFY_FAILED
    assert "b.restore" not in cluster.world.effects


def test_what_the_restore_itself_touches_comes_in_the_freeze(cluster: Cluster) -> None:
    cluster.ready()
    wanted = Piece("app", 1, ((AWAY + 7 * len(PAGE), AWAY + 8 * len(PAGE)),))
    left: list[int] = []

    def touch() -> None:
        cluster.b.fake.wanted.append(wanted)
        until(lambda: wanted.ranges[0][0] not in missing(cluster))
        left.append(len(missing(cluster)))

    cluster.world.fail["b.restore"] = touch
    assert cluster.switch(post_copy=True).committed
    assert left == [PAGES - 1], "the rest must not compete with the freeze"
    mend(cluster)
    comes_to_its_end(cluster)


def test_what_is_waited_for_overtakes_the_rest(cluster: Cluster) -> None:
    cluster.a.fake.withholds = 400
    switch_with_the_link_cut(cluster)
    last = AWAY + 399 * len(PAGE)
    cluster.world.fail["a.read_pages"] = lambda: time.sleep(0.02)
    cluster.b.fake.wanted.append(Piece("app", 1, ((last, last + len(PAGE)),)))
    until(lambda: last not in missing(cluster))
    assert len(missing(cluster)) > 100
    mend(cluster)
    comes_to_its_end(cluster)


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_agent_that_is_restarted_goes_on(cluster: Cluster, name: str) -> None:
    switch_with_the_link_cut(cluster)
    node = getattr(cluster, name)
    node.stop()
    mend(cluster)
    assert len(missing(cluster)) == PAGES
    node.start()
    comes_to_its_end(cluster)


def is_lost(cluster: Cluster, reason: Reason) -> None:
    until(lambda: target(cluster).step == "Lost")
    lost = target(cluster).lost
    assert lost.reason == reason
    assert "lost" in lost.message
    assert cluster.b.fake.aborted_slots == {"app"}, "it must not run on"


def test_a_source_whose_processes_are_gone_takes_the_copy_with_it(cluster: Cluster) -> None:
    switch_with_the_link_cut(cluster)
    cluster.a.fake.killed = True  # the node was rebooted
    mend(cluster)
    is_lost(cluster, Reason.PAGES_LOST)
    until(lambda: cluster.a.steps()[-1:] == ["Arrived"])
    cluster.finish()
    assert not cluster.b.fake.stores_here


def test_a_fenced_source_takes_a_running_copy_with_it(cluster: Cluster) -> None:
    switch_with_the_link_cut(cluster)
    cluster.a.stop()
    request = pb.RunRequest(migration=cluster.ref())
    run_fenced = cluster.b.api.RunFenced
    for _ in range(2):
        assert refusal(lambda: run_fenced(request, timeout=TIMEOUT)) is Reason.NODE_LOST
    is_lost(cluster, Reason.NODE_LOST)
    cluster.b.api.FinishTarget(pb.FinishTargetRequest(migration=cluster.ref()), timeout=TIMEOUT)
    assert not cluster.b.fake.stores_here


def restart_the_target_node(cluster: Cluster) -> None:
    cluster.b.stop()
    cluster.b.fake.reboot()
    cluster.b.start()


def test_a_target_node_that_is_restarted_says_what_is_lost(cluster: Cluster) -> None:
    switch_with_the_link_cut(cluster)
    restart_the_target_node(cluster)
    until(lambda: target(cluster).step == "Lost")
    lost = target(cluster).lost
    assert lost.reason == Reason.NODE_LOST
    assert "still on its source" in lost.message
    assert "the node it ran on was restarted" in lost.message
    # nobody needs what stands frozen
    until(lambda: cluster.a.steps()[-1:] == ["Arrived"])
    assert "a.thaw" not in cluster.world.effects
    cluster.finish()
    assert cluster.a.steps() == ["Finished"]
    assert SUCCESSOR not in cluster.b.fake.marked_pods, "it may start anew"
    restart_the_target_node(cluster)
    assert target(cluster).lost.reason == Reason.NODE_LOST


def test_once_every_page_has_come_the_restart_is_one_as_any_other(cluster: Cluster) -> None:
    cluster.ready()
    assert cluster.switch(post_copy=True).committed
    until(lambda: cluster.a.steps()[-1:] == ["Arrived"])
    restart_the_target_node(cluster)
    assert target(cluster).step == "Arrived"
    assert not target(cluster).HasField("lost")
    cluster.finish()
    assert SUCCESSOR not in cluster.b.fake.marked_pods


def test_a_fenced_source_leaves_a_copy_that_has_every_page_by_then(cluster: Cluster) -> None:
    """The last page came while the fetching was stopped: nobody has written that down."""
    switch_with_the_link_cut(cluster)
    cluster.a.stop()
    cluster.world.fail["b.let_go"] = lambda: missing(cluster).clear()
    request = pb.RunRequest(migration=cluster.ref())
    cluster.b.api.RunFenced(request, timeout=TIMEOUT)
    assert target(cluster).step == "Arrived"
    assert not cluster.b.fake.aborted_slots
    request = pb.FinishTargetRequest(migration=cluster.ref())
    cluster.b.api.FinishTarget(request, timeout=TIMEOUT)
    assert not cluster.b.fake.stores_here


def test_a_fenced_source_never_lets_an_incomplete_copy_run(cluster: Cluster) -> None:
    cluster.ready()
    cut(cluster)
    cluster.world.fail["a.route_via"] = OSError("killed")
    cluster.world.fail["b.resume"] = Retryable(Reason.INTERNAL, "not yet")
    assert refusal(lambda: cluster.switch(post_copy=True, timeout=4)) is Reason.AGENT_UNREACHABLE
    cluster.a.stop()
    request = pb.RunRequest(migration=cluster.ref())
    run_fenced = cluster.b.api.RunFenced
    assert refusal(lambda: run_fenced(request, timeout=TIMEOUT)) is Reason.NODE_LOST
    assert not cluster.b.fake.running


def test_a_page_daemon_that_dies_takes_the_copy_with_it(cluster: Cluster) -> None:
    switch_with_the_link_cut(cluster)
    cluster.b.fake.serving = Serving.BROKEN
    is_lost(cluster, Reason.PAGES_LOST)


def test_a_copy_that_has_ended_needs_no_more_pages(cluster: Cluster) -> None:
    switch_with_the_link_cut(cluster)
    cluster.b.fake.serving = Serving.ENDED
    until(lambda: target(cluster).step == "Arrived")
    until(lambda: "a.kill" in cluster.world.effects)
    assert not cluster.b.fake.aborted_slots


def test_a_restore_that_fails_leaves_the_source_as_it_was(cluster: Cluster) -> None:
    cluster.ready()
    cluster.world.fail["b.restore"] = Aborted(Reason.RESTORE_FAILED, "no memory")
    got = cluster.switch(post_copy=True)
    assert not got.committed
    assert not cluster.a.fake.frozen_ids
    assert "a.kill" not in cluster.world.effects
    cluster.abort_target()
    assert not cluster.b.fake.stores_here


def ask(cluster: Cluster, ranges: list[int], node: str = "b") -> Callable[[], object]:
    identity = getattr(cluster, node).identity
    request = pb.PagesRequest(migration=cluster.ref(), container="app", vpid=1, ranges=ranges)

    def call() -> None:
        channel, stub = cluster.a.peer_stub(identity)
        with channel:
            stub.Pages(request, timeout=TIMEOUT)

    return call


def test_pages_are_for_the_target_of_a_switch_only(cluster: Cluster) -> None:
    cluster.ready()
    page = [AWAY, AWAY + len(PAGE)]
    assert refusal(ask(cluster, page)) is Reason.WRONG_STEP
    cut(cluster)
    cluster.switch(post_copy=True)
    mend(cluster)
    assert refusal(ask(cluster, page, "a")) is Reason.WRONG_PEER
    for ranges in ([], [AWAY], [AWAY, AWAY], [AWAY + 1, AWAY + len(PAGE)], [AWAY, AWAY + (1 << 30)],
                   [AWAY + len(PAGE), AWAY + 2 * len(PAGE), AWAY, AWAY + len(PAGE)]):  # fmt: skip
        assert refusal(ask(cluster, ranges)) is Reason.MALFORMED
    comes_to_its_end(cluster)
    assert refusal(ask(cluster, page)) is Reason.WRONG_STEP


def test_the_source_may_be_told_before_it_knows_that_the_copy_runs(cluster: Cluster) -> None:
    """Its agent was restarted between the two."""
    cluster.ready()
    cluster.world.fail["a.hold_address"] = lambda: time.sleep(0.5)
    assert cluster.switch(post_copy=True).committed
    comes_to_its_end(cluster)


def test_a_budget_that_is_not_met_is_no_obstacle(cluster: Cluster) -> None:
    cluster.a.fake.dirty = [10 << 20]
    cluster.prepare()
    told = cluster.copy(budget_ms=190, limit=100_000_000, post_copy=True)
    assert told[-1].converged
    assert told[-1].remaining_bytes > 4 << 20
    assert told[-1].predicted_freeze_ms <= 190
    cluster.hand_over(uid=SUCCESSOR)
    rounds = cluster.world.effects.count("a.round")
    assert refusal_reason(cluster.switch(budget_ms=151)) is Reason.FREEZE_BUDGET_EXCEEDED
    rounds_asked = cluster.world.effects.count("a.round") - rounds
    assert rounds_asked, "without post-copy another round might have helped"
    assert cluster.switch(budget_ms=151, post_copy=True).committed
    assert cluster.world.effects.count("a.round") == rounds + rounds_asked
    comes_to_its_end(cluster)


def test_a_budget_counts_what_cannot_be_withheld(cluster: Cluster) -> None:
    """10 MiB of shared memory take 105 ms of a link that carries 100 MB/s."""
    cluster.a.fake.dirty = [10 << 20]
    cluster.a.fake.bound = 10 << 20
    cluster.prepare()
    limits = {"budget_ms": 190, "limit": 100_000_000}
    assert refusal(lambda: cluster.copy(**limits, post_copy=True)) is Reason.FREEZE_BUDGET_EXCEEDED
    cluster.a.fake.bound = 0
    assert cluster.copy(**limits, post_copy=True)[-1].converged


@pytest.mark.parametrize("bound", [0, 9 << 20])
def test_only_what_cannot_be_withheld_is_copied_once_more(cluster: Cluster, bound: int) -> None:
    cluster.a.fake.dirty = [20 << 20]
    cluster.a.fake.bound = bound
    cluster.ready()
    rounds = cluster.world.effects.count("a.round")
    assert cluster.switch(post_copy=True).committed
    assert (cluster.world.effects.count("a.round") > rounds) == bool(bound)
    comes_to_its_end(cluster)


def refusal_reason(response: pb.SwitchResponse) -> Reason:
    assert not response.committed
    return Reason(response.failure.reason)
