"""Any order of calls, failures and restarts: never two running copies, never none.

Both agents are real, with gRPC and streams between them; the hosts are fake,
and every effect on them checks the invariants. The caller obeys no plan: it
repeats, reorders, forgets answers and names old epochs, so what holds here
holds without trust in the operator.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from pathlib import Path

import grpc
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes.cluster import MIGRATION, Cluster, Node
from fakes.host import World
from godwit_api import failpoints
from godwit_api.pb import agent_pb2 as pb

SUCCESSORS = {
    1: "22222222-2222-2222-2222-222222222222",
    2: "33333333-3333-3333-3333-333333333333",
}
EFFECTS = [
    "a.freeze", "a.drop", "a.dump", "a.dumped", "a.final_memory", "a.images", "a.reject",
    "a.thaw", "a.lift", "a.route_via", "a.hold_address", "a.kill", "a.read_pages",
    "b.bind", "b.start_daemons", "b.complete", "b.restore", "b.route_local", "b.open_door",
    "b.resume", "b.abort_restore", "b.destroy_store",
]  # fmt: skip
CALL_S = 4.0
epochs = st.sampled_from([1, 1, 1, 2])


class WatchedWorld(World):
    """Looks at both nodes after every effect that can change who runs."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster: Cluster | None = None
        self.violations: list[str] = []

    def do(self, node: str, what: str) -> None:
        super().do(node, what)
        cluster = self.cluster
        if cluster is None:
            return
        source, target = cluster.a.fake, cluster.b.fake
        last = self.effects[-12:]
        # each effect is announced right before it happens
        if what == "resume" and not (source.frozen_ids or source.killed):
            self.violations.append(f"resumed beside a running source: {last}")
        if what == "resume" and not _commit_records(cluster.a):
            self.violations.append(f"resumed without a commit record: {last}")
        if f"{node}.{what}" == "a.thaw" and _commit_records(cluster.a):
            self.violations.append(f"thawed behind a commit record: {last}")
        if f"{node}.{what}" == "a.thaw" and target.running:
            self.violations.append(f"thawed beside a running copy: {last}")
        if f"{node}.{what}" == "a.kill" and not target.running:
            self.violations.append(f"the only copy was killed: {last}")
        if f"{node}.{what}" == "a.kill" and any(
            store.away.pages for store in target.stores_here.values()
        ):
            self.violations.append(f"pages were thrown away that the copy has not got: {last}")
        if f"{node}.{what}" == "b.abort_restore" and (target.running or source.killed):
            self.violations.append(f"the running copy was thrown away: {last}")


def _commit_records(node: Node) -> list[Path]:
    journals = node.config.journal_dir.glob("*/*.source")
    return [path for path in journals if b'"Committed"' in path.read_bytes()]


class End:
    """An effect at which its process ends: it comes back only when all is over."""

    def __init__(self, over: threading.Event) -> None:
        self.reached, self._over = threading.Event(), over

    def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            self._over.wait(60)
            raise OSError("this process has ended")


class WatchedCluster(Cluster):
    """A cluster in such a world."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        watched = WatchedWorld()
        self.world = watched
        for node in (self.a, self.b):
            node.fake.world = watched
        watched.cluster = self
        self.a.fake.withholds = 20

    @property
    def violations(self) -> list[str]:
        assert isinstance(self.world, WatchedWorld)
        return self.world.violations


class AnyOrder(RuleBasedStateMachine):
    """One migration, two epochs, one target."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="godwit-any-order-"))
        self.cluster = WatchedCluster(self.directory)
        self.forgotten: list[threading.Thread] = []
        self.over = threading.Event()
        failpoints.enable(str(self.directory / "failpoints"))

    @initialize()
    def begin(self) -> None:
        self.cluster.ready()

    def _try(self, method: object, *arguments: object, **more: object) -> None:
        with contextlib.suppress(grpc.RpcError):
            method(*arguments, **more)  # type: ignore[operator]

    @rule(epoch=epochs)
    def prepare_and_copy(self, epoch: int) -> None:
        self._try(self.cluster.prepare, epoch)
        self._try(self.cluster.copy, epoch)

    @rule(epoch=epochs)
    def hand_over(self, epoch: int) -> None:
        self._try(self.cluster.hand_over, epoch, uid=SUCCESSORS[epoch])

    @rule(epoch=epochs, post_copy=st.booleans())
    def switch(self, epoch: int, post_copy: bool) -> None:
        limits = {"timeout": CALL_S, "freeze_timeout_ms": 1000}
        self._try(self.cluster.switch, epoch, **limits, post_copy=post_copy)

    @rule(epoch=epochs, effect=st.sampled_from(EFFECTS))
    def end_a_process_in_the_switch(self, epoch: int, effect: str) -> None:
        self._join()
        end = End(self.over)
        self.cluster.world.fail[effect] = end
        switch = self._call_switch(epoch)
        while switch.is_alive() and not end.reached.wait(0.02):
            continue
        self.cluster.world.fail.pop(effect, None)
        if end.reached.is_set():
            self._restart(self.cluster.a if effect.startswith("a.") else self.cluster.b)
        switch.join(3 * CALL_S)

    @rule(epoch=epochs, failing=st.booleans())
    def end_the_target_before_the_record(self, epoch: int, failing: bool) -> None:
        """Its copy is complete and stopped; the source decides while a new target starts."""
        self._join()
        directory = self.directory / "failpoints"
        for path in directory.iterdir():
            path.unlink()
        (directory / "part.commit").write_text("pause")
        if failing:
            (directory / "source.Committed.before").write_text("error")
        switch = self._call_switch(epoch)
        while switch.is_alive() and not (directory / "part.commit.hit").exists():
            switch.join(0.02)
        if switch.is_alive():
            self._restart(self.cluster.b)
            (directory / "part.commit.go").touch()
        switch.join(3 * CALL_S)

    def _restart(self, node: Node) -> None:
        node.stop()
        node.start()

    def _join(self) -> None:
        for thread in self.forgotten:
            thread.join(3 * CALL_S)
            assert not thread.is_alive()
        self.forgotten.clear()

    @rule(epoch=epochs)
    def switch_and_forget(self, epoch: int) -> None:
        self.forgotten.append(self._call_switch(epoch))

    def _call_switch(self, epoch: int) -> threading.Thread:
        api, request = self.cluster.a.api, self._switch_request(epoch)

        def call() -> None:
            with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: channel closed
                api.Switch(request, timeout=CALL_S)

        thread = threading.Thread(target=call)
        thread.start()
        return thread

    def _switch_request(self, epoch: int) -> pb.SwitchRequest:
        return pb.SwitchRequest(
            migration=self.cluster.ref(epoch),
            pod=self.cluster.pod(),
            target=self.cluster.b.peer(),
            freeze_timeout_ms=1000,
            post_copy=epoch == 1,
        )

    @rule(epoch=epochs, lift=st.booleans())
    def abort_source(self, epoch: int, lift: bool) -> None:
        self._try(self.cluster.abort_source, epoch, lift_guard=lift)

    @rule(epoch=epochs)
    def abort_target(self, epoch: int) -> None:
        self._try(self.cluster.abort_target, epoch)

    @rule(epoch=epochs)
    def finish(self, epoch: int) -> None:
        self._try(self.cluster.finish, epoch)

    @rule(epoch=epochs, word=st.sampled_from(["Arm", "Restore", "Run", "AbortRestore"]))
    def a_word_comes_once_more(self, epoch: int, word: str) -> None:
        """Of the source to the target: late, or for the second time. ``Run`` and ``AbortRestore``
        exist only where the source has decided so."""
        decided = {"Run": "Committed", "AbortRestore": "Thawed"}.get(word)
        if decided and not self._journalled(epoch, decided):
            return
        cluster = self.cluster
        channel, stub = cluster.b.peer_stub(cluster.a.identity)
        request = getattr(pb, f"{word}Request")(migration=cluster.ref(epoch))
        with channel:
            self._try(getattr(stub, word), request, timeout=CALL_S)

    def _journalled(self, epoch: int, step: str) -> bool:
        path = self.cluster.a.config.journal_dir / MIGRATION / f"{epoch}.source"
        return path.exists() and f'"{step}"'.encode() in path.read_bytes()

    @rule(effect=st.sampled_from(EFFECTS))
    def break_effect(self, effect: str) -> None:
        self.cluster.world.fail[effect] = OSError(f"{effect} is broken")

    @rule(effect=st.sampled_from(EFFECTS))
    def slow_effect(self, effect: str) -> None:
        self.cluster.world.fail[effect] = lambda: time.sleep(0.3)

    @rule()
    def mend(self) -> None:
        self.cluster.world.fail.clear()

    @rule(source=st.booleans())
    def restart(self, source: bool) -> None:
        self._join()  # a call that goes on in its former process would not be a crash
        self._restart(self.cluster.a if source else self.cluster.b)

    @invariant()
    def nothing_was_violated(self) -> None:
        assert not self.cluster.violations, self.cluster.violations

    def teardown(self) -> None:
        try:
            self._comes_to_an_end()
        finally:
            failpoints.enable("")
            self.over.set()
            self.cluster.close()
            shutil.rmtree(self.directory)

    def _comes_to_an_end(self) -> None:
        """Once nothing fails any more, one copy runs, and the journal agrees which."""
        cluster = self.cluster
        cluster.world.fail.clear()
        self._join()
        for node in (cluster.a, cluster.b):
            self._restart(node)
        end = time.monotonic() + 20
        while not self._settled():
            assert time.monotonic() < end, (self._states(), cluster.world.effects[-30:])
            for epoch in (1, 2):  # the new ports of the target come with the operator's call
                if "Committed" in self._states()[epoch]:
                    self._try(cluster.switch, epoch, timeout=CALL_S)
            time.sleep(0.05)
        assert not cluster.violations, cluster.violations

    def _settled(self) -> bool:
        source, target = self.cluster.a.fake, self.cluster.b.fake
        undecided = {"Switching", "Committed"} & {s for e in self._states().values() for s in e}
        one = target.running if source.killed or source.frozen_ids else not target.running
        whole = not any(store.away.pages for store in self.cluster.b.fake.stores_here.values())
        return one and not undecided and (whole or not target.running)

    def _states(self) -> dict[int, list[str]]:
        request = pb.GetMigrationRequest(uid=MIGRATION)
        records = self.cluster.a.api.GetMigration(request, timeout=CALL_S).records
        return {e: [r.step for r in records if r.epoch == e] for e in (1, 2)}


AnyOrder.TestCase.settings = settings(
    max_examples=20,
    phases=[Phase.generate],  # to shrink takes longer than to read what happened
    stateful_step_count=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase
