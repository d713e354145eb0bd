"""Calls to the other agent of a migration."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from godwit_agent.app.model import Migration, PeerNode
from godwit_agent.hostops.model import Extent, Outgoing, Piece
from godwit_api.errors import Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc
from godwit_api.reasons import Reason
from godwit_api.wire import error_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Restored:
    """The target holds a complete, stopped, verified copy; of a post-copy ``missing_bytes`` are
    still on the source."""

    processes: int
    timings_us: Mapping[str, int]
    missing_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ran:
    """The copy runs."""

    resumed_unix_ns: int
    timings_us: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the source has decided; neither of both means: not yet."""

    committed: bool
    aborted: bool


class Peer(Protocol):
    """The other agent. Every method raises a ``GodwitError``, whatever went wrong."""

    def warm(self, timeout_s: float) -> None:
        """Connects now, so that the first call does not pay for it."""

    def arm(self, migration: Migration, timeout_s: float) -> None: ...
    def restore(
        self,
        migration: Migration,
        timeout_s: float,
        outgoing: Iterable[Outgoing],
        *,
        post_copy: bool = False,
    ) -> Restored: ...
    def take_route(self, migration: Migration, timeout_s: float) -> None: ...
    def run(self, migration: Migration, timeout_s: float) -> Ran: ...
    def abort_restore(self, migration: Migration, timeout_s: float) -> None: ...
    def committed(self, migration: Migration, timeout_s: float) -> Decision: ...
    def pages(self, migration: Migration, piece: Piece, timeout_s: float) -> Sequence[Extent]: ...
    def arrived(self, migration: Migration, timeout_s: float) -> None: ...
    def close(self) -> None: ...


PeerFactory = Callable[[PeerNode], Peer]


class GrpcPeer:
    """``Peer`` over a channel of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = agent_pb2_grpc.PeerStub(channel)

    def warm(self, timeout_s: float) -> None:
        """Connects; ``arm`` then is the first call that goes the whole way."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            ready.cancel()
            message = f"no connection to the other agent within {timeout_s:.0f} s"
            raise Retryable(Reason.AGENT_UNREACHABLE, message) from None

    def arm(self, migration: Migration, timeout_s: float) -> None:
        request = pb.ArmRequest(migration=_ref(migration))
        _call(lambda: self._stub.Arm(request, timeout=timeout_s))

    def restore(
        self,
        migration: Migration,
        timeout_s: float,
        outgoing: Iterable[Outgoing],
        *,
        post_copy: bool = False,
    ) -> Restored:
        request = pb.RestoreRequest(
            migration=_ref(migration),
            outgoing=(_outgoing(one) for one in outgoing),
            post_copy=post_copy,
        )
        response = _call(lambda: self._stub.Restore(request, timeout=timeout_s))
        return Restored(response.processes, dict(response.timings_us), response.missing_bytes)

    def take_route(self, migration: Migration, timeout_s: float) -> None:
        request = pb.TakeRouteRequest(migration=_ref(migration))
        _call(lambda: self._stub.TakeRoute(request, timeout=timeout_s))

    def run(self, migration: Migration, timeout_s: float) -> Ran:
        request = pb.RunRequest(migration=_ref(migration))
        response = _call(lambda: self._stub.Run(request, timeout=timeout_s))
        return Ran(response.resumed_unix_ns, dict(response.timings_us))

    def abort_restore(self, migration: Migration, timeout_s: float) -> None:
        request = pb.AbortRestoreRequest(migration=_ref(migration))
        _call(lambda: self._stub.AbortRestore(request, timeout=timeout_s))

    def committed(self, migration: Migration, timeout_s: float) -> Decision:
        request = pb.CommittedRequest(migration=_ref(migration))
        response = _call(lambda: self._stub.Committed(request, timeout=timeout_s))
        return Decision(response.committed, response.aborted)

    def pages(self, migration: Migration, piece: Piece, timeout_s: float) -> list[Extent]:
        request = pb.PagesRequest(
            migration=_ref(migration),
            container=piece.container,
            vpid=piece.vpid,
            ranges=itertools.chain.from_iterable(piece.ranges),
        )
        response = _call(lambda: self._stub.Pages(request, timeout=timeout_s))
        return [Extent(one.vaddr, one.length, one.data) for one in response.extents]

    def arrived(self, migration: Migration, timeout_s: float) -> None:
        request = pb.ArrivedRequest(migration=_ref(migration))
        _call(lambda: self._stub.Arrived(request, timeout=timeout_s))

    def close(self) -> None:
        self._channel.close()


def _call(work: Callable[[], T]) -> T:
    try:
        return work()
    except grpc.RpcError as error:
        raise error_of(error) from error


def _outgoing(one: Outgoing) -> pb.Outgoing:
    return pb.Outgoing(
        protocol=one.protocol,
        client_address=one.client[0],
        client_port=one.client[1],
        service_address=one.service[0],
        service_port=one.service[1],
        server_address=one.server[0],
        server_port=one.server[1],
        status=one.status,
        timeout_seconds=one.timeout_s,
        tcp=one.tcp,
    )


def _ref(migration: Migration) -> pb.MigrationRef:
    return pb.MigrationRef(
        uid=migration.uid,
        epoch=migration.epoch,
        namespace=migration.namespace,
        name=migration.name,
    )


def until(deadline: float) -> float:
    """Seconds left until a ``time.monotonic()`` deadline, at least a little."""
    return max(deadline - time.monotonic(), 0.05)
