"""What a call names, decoded and checked (see ``server/decode.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from godwit_api.reasons import Reason


@dataclass(frozen=True, slots=True)
class Migration:
    """One attempt of one migration."""

    uid: str
    epoch: int
    namespace: str
    name: str

    @property
    def keys(self) -> dict[str, object]:
        """For each line of the log that is about it."""
        return {"uid": self.uid, "epoch": self.epoch}

    def to_json(self) -> dict[str, Any]:
        return {"uid": self.uid, "epoch": self.epoch, "ns": self.namespace, "name": self.name}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Migration:
        return cls(value["uid"], value["epoch"], value["ns"], value["name"])


@dataclass(frozen=True, slots=True)
class Pod:
    """A Pod object and the addresses that move with it. ``ip`` is empty for a pod that keeps
    the native one; ``more_ips``: of the other family."""

    namespace: str
    name: str
    uid: str
    ip: str
    more_ips: tuple[str, ...] = ()

    @property
    def ips(self) -> tuple[str, ...]:
        return (self.ip, *self.more_ips) if self.ip else ()

    def to_json(self) -> dict[str, Any]:
        return {
            "ns": self.namespace,
            "name": self.name,
            "uid": self.uid,
            "ip": self.ip,
            "more_ips": list(self.more_ips),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pod:
        more = tuple(value.get("more_ips", ()))
        return cls(value["ns"], value["name"], value["uid"], value["ip"], more)


@dataclass(frozen=True, slots=True)
class PeerNode:
    """Another agent."""

    name: str
    address: str
    control_port: int
    transfer_port: int
    more_addresses: tuple[str, ...] = ()

    def address_for(self, ip: str) -> str | None:
        """The node's address by which ``ip`` can be routed to it: one of the same family."""
        known = (self.address, *self.more_addresses)
        return next((one for one in known if (":" in one) == (":" in ip)), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "address": self.address,
            "control_port": self.control_port,
            "transfer_port": self.transfer_port,
            "more_addresses": list(self.more_addresses),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PeerNode:
        return cls(
            value["name"],
            value["address"],
            value["control_port"],
            value["transfer_port"],
            tuple(value.get("more_addresses", ())),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a switch ended; journalled, so that a repeated call hears the same."""

    committed: bool
    reason: Reason | None = None
    message: str = ""
    freeze_us: int = 0
    transferred_bytes: int = 0
    timings_us: Mapping[str, int] = field(default_factory=dict)
    missing_bytes: int = 0  # of a post-copy: on the source when it was committed

    def to_json(self) -> dict[str, Any]:
        return {
            "committed": self.committed,
            "reason": self.reason.value if self.reason else None,
            "message": self.message,
            "freeze_us": self.freeze_us,
            "transferred_bytes": self.transferred_bytes,
            "timings_us": dict(self.timings_us),
            "missing_bytes": self.missing_bytes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        return cls(
            value["committed"],
            Reason(value["reason"]) if value["reason"] else None,
            value["message"],
            value["freeze_us"],
            value["transferred_bytes"],
            value["timings_us"],
            value.get("missing_bytes", 0),
        )


@dataclass(frozen=True, slots=True)
class MovedAddress:
    """Where a moved address is now."""

    ip: str
    node_address: str
    node: str
    pod_uid: str


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """State of a copy, for the operator."""

    round: int
    transferred_bytes: int
    remaining_bytes: int
    dirty_bytes_per_s: int
    bandwidth_bytes_per_s: int
    predicted_freeze_ms: int
    converged: bool
    cpu_percent: int = 100  # of what the pod used before it was slowed down


@dataclass(frozen=True, slots=True)
class CopyPolicy:
    """How a copy is made. ``budget_ms`` and ``limit`` (bytes/s): 0 for none.

    ``throttle``: slow the pod down, step by step, before a budget is refused;
    ``post_copy``: switch instead of a refusal, the rest comes after it.
    """

    budget_ms: int = 0
    limit: int = 0
    compress: bool = False
    throttle: bool = False
    post_copy: bool = False
