"""Protobuf in, checked values out. Everything a caller sends is doubted here, once."""

from __future__ import annotations

import ipaddress
import itertools
import re

from godwit_agent.app.model import CopyPolicy, Migration, MovedAddress, PeerNode, Pod
from godwit_agent.hostops.model import (
    HostPath,
    NodeFacts,
    Outgoing,
    Piece,
    Plan,
    Profiles,
    Tracking,
    Volume,
)
from godwit_api.errors import Rejected
from godwit_api.objectstores import Store, faults
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason

_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
_MAX_BYTES = 1 << 50
_MAX_MS = 86_400_000
_MAX_CONTAINERS = 64
_MAX_ADDRESSES = 100_000
_MAX_FEATURES = 2000
_MAX_COMMAND_BYTES = 1 << 20
_MAX_CONNECTIONS = 65_536
_MAX_TCP_BYTES = 64
_MAX_MORE = 8
_MAX_VOLUMES = 64
_MAX_PATH = 4096
_MAX_TIMEOUT_S = 432_000  # nf_conntrack_tcp_timeout_established


_PAGE = 4096
_MAX_RANGES = 4096
_MAX_PIECE_BYTES = 4 << 20
_ADDRESS_SPACE = 1 << 57


def _bad(message: str) -> Rejected:
    return Rejected(Reason.MALFORMED, message)


def uid(value: str, field: str) -> str:
    if not _UID.match(value):
        raise _bad(f"{field} is no UID")
    return value


def name(value: str, field: str) -> str:
    if not _SUBDOMAIN.match(value):
        raise _bad(f"{field} is no Kubernetes name")
    return value


def label(value: str, field: str) -> str:
    if not _LABEL.match(value):
        raise _bad(f"{field} is no DNS label")
    return value


def ip(value: str, field: str) -> str:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise _bad(f"{field} is no IP address") from None
    unusable = (
        address.is_unspecified
        or address.is_multicast
        or address.is_loopback
        or (address.version == 6 and (address.is_link_local or "%" in value))
    )
    if unusable and not (field.endswith("address") and address.is_loopback):
        raise _bad(f"{field} is no address of a pod or node")
    return str(address)


def size(value: int, field: str) -> int:
    if not 0 <= value <= _MAX_BYTES:
        raise _bad(f"{field} is out of range")
    return value


def milliseconds(value: int, field: str) -> int:
    if not 0 <= value <= _MAX_MS:
        raise _bad(f"{field} is out of range")
    return value


def copy_policy(request: pb.CopyRequest) -> CopyPolicy:
    return CopyPolicy(
        budget_ms=milliseconds(request.freeze_budget_ms, "freeze_budget_ms"),
        limit=size(request.bandwidth_limit_bytes_per_s, "bandwidth_limit"),
        compress=request.compress,
        throttle=request.throttle,
        post_copy=request.post_copy,
    )


def migration(ref: pb.MigrationRef) -> Migration:
    if not 0 < ref.epoch < 1 << 62:
        raise _bad("migration.epoch is not positive")
    return Migration(
        uid(ref.uid, "migration.uid"),
        ref.epoch,
        label(ref.namespace, "migration.namespace"),
        name(ref.name, "migration.name"),
    )


def pod(ref: pb.PodRef) -> Pod:
    return Pod(
        label(ref.namespace, "pod.namespace"),
        name(ref.name, "pod.name"),
        uid(ref.uid, "pod.uid"),
        *_ips(ref),
    )


def _ips(ref: pb.PodRef) -> tuple[str, tuple[str, ...]]:
    first, more = ip(ref.ip, "pod.ip"), tuple(ip(one, "pod.more_ips") for one in ref.more_ips)
    if len(more) > 1 or any((":" in one) == (":" in first) for one in more):
        raise _bad("pod.more_ips is more than one address of the other family")
    return first, more


def peer(node: pb.PeerNode, field: str) -> PeerNode:
    for port in (node.control_port, node.transfer_port):
        if not 0 < port < 65536:
            raise _bad(f"{field} has a port out of range")
    return PeerNode(
        name(node.name, f"{field}.name"),
        ip(node.address, f"{field}.address"),
        node.control_port,
        node.transfer_port,
        tuple(ip(one, f"{field}.more_address") for one in node.more_addresses[:_MAX_MORE]),
    )


def containers(names: list[str]) -> tuple[str, ...]:
    result = tuple(label(value, "containers") for value in names)
    if not 0 < len(result) <= _MAX_CONTAINERS or len(set(result)) != len(result):
        raise _bad("containers are none, too many or repeated")
    return result


def volumes(values: list[pb.CopiedVolume]) -> tuple[Volume, ...]:
    """Directories of a node: absolute, as written by somebody who means them, none in another."""
    found = tuple(
        Volume(label(v.name, "volumes.name"), _path(v.path, "volumes.path")) for v in values
    )
    if len(found) > _MAX_VOLUMES or len({one.name for one in found}) != len(found):
        raise _bad("volumes are too many or repeated")
    for one in found:
        if any(f"{other.path}/".startswith(f"{one.path}/") for other in found if other is not one):
            raise _bad(f"volumes.path {one.path} is part of another volume")
    return found


def _path(value: str, field: str) -> HostPath:
    parts = value.split("/")
    good = len(value) <= _MAX_PATH and "\0" not in value and len(parts) > 1 and parts[0] == ""
    if not good or any(part in ("", ".", "..") for part in parts[1:]):
        raise _bad(f"{field} {value!r} is no plain absolute path")
    return HostPath(value)


def addresses(values: list[pb.MovedAddress]) -> tuple[MovedAddress, ...]:
    if len(values) > _MAX_ADDRESSES or len({value.ip for value in values}) != len(values):
        raise _bad("addresses are too many or repeated")
    return tuple(
        MovedAddress(
            ip(value.ip, "addresses.ip"),
            ip(value.node_address, "addresses.node_address"),
            name(value.node, "addresses.node"),
            uid(value.pod_uid, "addresses.pod_uid"),
        )
        for value in values
    )


def node_report(report: pb.NodeReport) -> NodeFacts:
    """What the source said about itself, as the operator passes it on."""
    features = report.cpu_features
    if len(features) > _MAX_FEATURES or len(report.versions) > _MAX_FEATURES:
        raise _bad("source_report is too large")
    tracking = report.dirty_tracking
    return NodeFacts(
        kernel=report.kernel,
        architecture=report.architecture,
        versions=dict(report.versions),
        cpu_features=tuple(features),
        tracking=Tracking(tracking) if tracking in set(Tracking) else Tracking.PAGE_HASH,
        problems=(),
        ip_pools=tuple(report.ip_pools),
    )


def profiles(request: pb.CheckTargetRequest) -> Profiles:
    """Names that may become paths: none leads out of a directory."""
    found = Profiles(tuple(request.apparmor_profiles), tuple(request.seccomp_profiles))
    if len(found.apparmor) + len(found.seccomp) > _MAX_CONTAINERS * 2:
        raise _bad("profiles are too many")
    for path in found.seccomp:
        _path(f"/{path}", "seccomp_profiles")
    return found


def store(message: pb.ObjectStore) -> Store:
    """All that is wrong with it at once."""
    found = Store(
        message.endpoint,
        message.bucket,
        message.prefix,
        message.region,
        message.access_key,
        message.secret_key,
        message.ca_pem,
    )
    if wrong := [f"store.{name} {what}" for name, what in faults(found)]:
        raise _bad("; ".join(wrong))
    return found


def plan(message: pb.ExpectPodRequest | pb.PrepareRestoreRequest) -> Plan:
    if len(message.done) > _MAX_CONTAINERS or len(message.commands) > _MAX_CONTAINERS:
        raise _bad("too many containers")
    if message.ByteSize() > _MAX_COMMAND_BYTES:
        raise _bad("commands are too long")
    for one in message.commands:
        label(one.container, "commands.container")
    return Plan(
        done=tuple(label(one, "done") for one in message.done),
        post_start={one.container: tuple(one.post_start) for one in message.commands},
        startup={one.container: tuple(one.startup) for one in message.commands},
    )


def outgoing(items: list[pb.Outgoing]) -> tuple[Outgoing, ...]:
    """Connections for this node's table; whose they are is checked where they are adopted."""
    if len(items) > _MAX_CONNECTIONS:
        raise _bad("too many connections")
    return tuple(map(_outgoing, items))


def _outgoing(item: pb.Outgoing) -> Outgoing:
    client, service, server = (
        (item.client_address, item.client_port),
        (item.service_address, item.service_port),
        (item.server_address, item.server_port),
    )
    sizes = {len(address) for address, _ in (client, service, server)}
    ports = (client[1], service[1], server[1])
    good = (
        item.protocol in (6, 17)
        and sizes in ({4}, {16})
        and all(0 < port < 65536 for port in ports)
        and item.status < 1 << 16
        and len(item.tcp) <= _MAX_TCP_BYTES
    )
    if not good:
        raise _bad("outgoing: no connection")
    timeout_s = min(max(item.timeout_seconds, 1), _MAX_TIMEOUT_S)
    return Outgoing(item.protocol, client, service, server, item.status, timeout_s, item.tcp)


def piece(request: pb.PagesRequest) -> Piece:
    """What a target wants of a frozen process; little enough for one answer."""
    numbers = list(request.ranges)
    ranges = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    if not numbers or len(numbers) % 2 or len(ranges) > _MAX_RANGES or not request.vpid:
        raise _bad("ranges of pages are uneven, none, or too many")
    if any(number % _PAGE or number > _ADDRESS_SPACE for number in numbers):
        raise _bad("ranges of pages are not aligned, or outside the address space")
    rising = all(low <= high for low, high in itertools.pairwise(numbers))
    empty = any(start >= end for start, end in ranges)
    if empty or not rising or sum(end - start for start, end in ranges) > _MAX_PIECE_BYTES:
        raise _bad("ranges of pages overlap, are empty, or too large")
    return Piece(label(request.container, "container"), request.vpid, ranges)
