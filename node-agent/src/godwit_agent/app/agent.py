"""The application: both sides of migrations, addresses, and what the node is."""

from __future__ import annotations

from dataclasses import dataclass

from godwit_agent.app.addresses import Addresses
from godwit_agent.app.checkpointing import Checkpointer
from godwit_agent.app.copying import Connect, Copier
from godwit_agent.app.guarding import Guards
from godwit_agent.app.housekeeping import Housekeeping
from godwit_agent.app.journal import JournalStore, Key, Role, Step
from godwit_agent.app.model import Outcome, PeerNode, Pod
from godwit_agent.app.peers import PeerFactory
from godwit_agent.app.recover import recover
from godwit_agent.app.restoring import Restorer
from godwit_agent.app.source import Source
from godwit_agent.app.target import Target
from godwit_agent.config import Config
from godwit_agent.hostops.checkpoints.archives import Archives, Directory
from godwit_agent.hostops.checkpoints.objectstore import ObjectStore
from godwit_agent.hostops.checkpoints.spool import Spool
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath, NodeFacts
from godwit_agent.hostops.ports import Host
from godwit_agent.memory.freezes import Freezes
from godwit_api.errors import GodwitError
from godwit_api.objectstores import Store


@dataclass(frozen=True, slots=True)
class JournalSummary:
    """For ``GetMigration``."""

    epoch: int
    role: Role
    step: str
    outcome: Outcome | None
    missing_bytes: int = 0  # of a target's running copy
    lost: GodwitError | None = None


class Agent:
    """Everything behind the gRPC services."""

    def __init__(self, config: Config, host: Host, *, peers: PeerFactory, connect: Connect) -> None:
        self.config = config
        self._host = host
        self._journals = JournalStore(config.journal_dir)
        self._guards = Guards(host, self._journals, config.guard_seconds)
        self._housekeeping = Housekeeping(host, self._journals, config.journal_keep_hours)
        freezes = Freezes()
        self.source = Source(
            host=host,
            journals=self._journals,
            guards=self._guards,
            copier=Copier(connect, freezes),
            freezes=freezes,
            peers=peers,
            own_address=config.node_ip,
            default_freeze_timeout_ms=config.freeze_timeout_ms,
            freezes_at_once=config.freezes_at_once,
        )
        self.target = Target(host=host, journals=self._journals, peers=peers)
        here = PeerNode(config.node_name, config.node_ip, config.control_port, config.transfer_port)
        layout = Layout(run_dir=HostPath(str(config.run_dir)))
        self._directory = Directory(layout, str(config.checkpoint_dir))
        self.checkpoints = Checkpointer(
            host=host,
            sessions=self.source.sessions,
            guards=self._guards,
            spool=lambda uid, containers: Spool(layout, uid, containers),
            here=here,
        )
        self.restores = Restorer(host=host, target=self.target, layout=layout, here=here)
        self.addresses = Addresses(host, config.node_name, self._moving)

    def start(self) -> None:
        """Takes up what an earlier process left, before anybody may call."""
        self._guards.start()
        recover(self._journals, self.source, self.target)
        self._host.throttles.lift_all()  # no copy outlives its process
        self._housekeeping.sweep()
        self._housekeeping.start()

    def stop(self) -> None:
        """Ends threads. Migrations stay as they are on disk; the next process takes them up."""
        self.source.stop()
        self.target.stopping.set()
        self._guards.stop()
        self._housekeeping.stop()

    def archives(self, store: Store | None) -> Archives:
        """Those of an object store, or of this node."""
        return ObjectStore(store) if store else self._directory

    def node_facts(self) -> NodeFacts:
        return self._host.probe.facts()

    def records(self, uid: str) -> list[JournalSummary]:
        """All attempts of a migration that this node knows."""
        return [self._summary(key) for key in self._journals.attempts(uid)]

    def _summary(self, key: Key) -> JournalSummary:
        last = self._journals.open(key).last
        outcome = self.source.outcome(key) if key.role is Role.SOURCE else None
        missing, lost = self.target.missing(key) if key.role is Role.TARGET else (0, None)
        step = last.value if last else ""
        return JournalSummary(key.epoch, key.role, step, outcome, missing, lost)

    def _moving(self) -> frozenset[str]:
        """Addresses of migrations that are not over here."""
        found: set[str] = set()
        for journal in self._journals.readable():
            opened = journal.find(Step.OPENED)
            if opened and not journal.terminal:
                found.update(Pod.from_json(opened.data["pod"]).ips)
        return frozenset(found)
