"""Settings, names in certificates, decoding, and errors on the wire."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from godwit_agent import config
from godwit_agent.server import auth, decode
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable, Unsafe
from godwit_api.identity import OPERATOR_DNS_NAME, node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_api.wire import Metadata, error_of, status_of

UID = "01234567-89ab-cdef-0123-456789abcdef"
GOOD = {
    "GODWIT_NODE_NAME": "node-a.example",
    "GODWIT_NODE_IP": "10.1.2.3",
    "GODWIT_ENROLLMENT_ADDRESS": "godwit-operator.godwit:9462",
}
SAN = "x509_subject_alternative_name"


class Failed:
    def __init__(self, code: grpc.StatusCode, text: str, metadata: Metadata = ()) -> None:
        self._code, self._text, self._metadata = code, text, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Metadata:
        return self._metadata


@pytest.mark.parametrize(
    "error",
    [
        Rejected(Reason.STALE_EPOCH, "old"),
        Rejected(Reason.MALFORMED, "bad uid"),
        Rejected(Reason.WRONG_PEER, "not you"),
        Retryable(Reason.SOURCE_UNREACHABLE, "wait", delay_seconds=2.5),
        Aborted(Reason.FREEZE_TIMEOUT, "too long"),
        Unsafe(Reason.INTERNAL, "look"),
    ],
)
def test_a_decision_survives_the_wire(error: GodwitError) -> None:
    got = error_of(Failed(*status_of(error)))
    assert (type(got), got.reason, got.message) == (type(error), error.reason, error.message)
    if isinstance(error, Retryable):
        assert isinstance(got, Retryable)
        assert got.delay_seconds == error.delay_seconds


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Retryable, Reason.AGENT_UNREACHABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Retryable, Reason.TIMED_OUT),
        (grpc.StatusCode.UNIMPLEMENTED, Rejected, Reason.VERSION_DIFFERS),
        (grpc.StatusCode.INTERNAL, Retryable, Reason.INTERNAL),
        (grpc.StatusCode.DATA_LOSS, Retryable, Reason.INTERNAL),
    ],
)
def test_a_status_that_is_not_ours_decides_nothing(
    code: grpc.StatusCode, kind: type[GodwitError], reason: Reason
) -> None:
    got = error_of(Failed(code, "x"))
    assert isinstance(got, kind)
    assert got.reason is reason


def test_unknown_reasons_of_a_newer_version_are_survived() -> None:
    got = error_of(Failed(grpc.StatusCode.ABORTED, "x", (("godwit-reason", "Novel"),)))
    assert isinstance(got, Retryable)


def test_config() -> None:
    got = config.load({**GOOD, "GODWIT_RUN_DIR": "/tmp/x", "GODWIT_CONTROL_PORT": "1"})
    assert (got.node_ip, got.control_port, got.transfer_port) == ("10.1.2.3", 1, 9461)
    assert got.store_dir == Path("/tmp/x/store")
    assert "node_name" in got.summary()


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.load({})
    for name in GOOD:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NODE_NAME", "Node_A"),
        ("NODE_IP", "0.0.0.0"),
        ("NODE_IP", "fe80::1"),
        ("NODE_IP", "x"),
        ("ENROLLMENT_ADDRESS", "operator"),
        ("CONTROL_PORT", "70000"),
        ("CONTROL_PORT", "x"),
        ("TRANSFER_PORT", "9460"),
        ("RUN_DIR", "relative"),
        ("GUARD_SECONDS", "1"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(config.ConfigError, match=f"GODWIT_{name}"):
        config.load({**GOOD, f"GODWIT_{name}": value})


def test_only_the_operator_is_the_operator() -> None:
    auth.require_operator({SAN: [OPERATOR_DNS_NAME.encode()]})
    for names in ([], [b"x"], [node_dns_name("a").encode()], [OPERATOR_DNS_NAME.encode()] * 2):
        with pytest.raises(Rejected) as caught:
            auth.require_operator({SAN: names})
        assert caught.value.reason is Reason.WRONG_PEER


def test_the_node_is_in_the_name() -> None:
    assert auth.require_node({SAN: [node_dns_name("n.b").encode()]}) == "n.b"
    for names in ([], [OPERATOR_DNS_NAME.encode()], [b".node.godwit.internal"]):
        with pytest.raises(Rejected):
            auth.require_node({SAN: names})
    with pytest.raises(Rejected):
        auth.node_of_certificate({"subjectAltName": (("DNS", OPERATOR_DNS_NAME),)})
    with pytest.raises(Rejected):
        auth.node_of_certificate({})


@pytest.mark.parametrize(
    "ref",
    [
        {"uid": "../../etc"},
        {"uid": UID.upper()},
        {"uid": UID + "\n"},
        {"epoch": 0},
        {"epoch": -1},
        {"namespace": "a/b"},
        {"name": ""},
    ],
)
def test_migrations_are_checked(ref: dict[str, object]) -> None:
    good: dict[str, object] = {"uid": UID, "epoch": 1, "namespace": "ns", "name": "m"}
    decode.migration(pb.MigrationRef(**good))  # type: ignore[arg-type]
    with pytest.raises(Rejected) as caught:
        decode.migration(pb.MigrationRef(**(good | ref)))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("ip", ["", "x", "0.0.0.0", "224.0.0.1", "127.0.0.1", "::1", "10.0.0.1/8"])
def test_addresses_of_pods_are_checked(ip: str) -> None:
    with pytest.raises(Rejected):
        decode.pod(pb.PodRef(namespace="ns", name="p", uid=UID, ip=ip))


def test_peers_are_checked() -> None:
    good = {"name": "n", "address": "10.0.0.1", "control_port": 1, "transfer_port": 2}
    decode.peer(pb.PeerNode(**good), "target")  # type: ignore[arg-type]
    for change in ({"name": "N"}, {"address": ""}, {"control_port": 0}, {"transfer_port": 65536}):
        with pytest.raises(Rejected):
            decode.peer(pb.PeerNode(**(good | change)), "target")  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [[], ["a", "a"], ["A"], ["a.b"], ["a"] * 70])
def test_container_names_are_checked(names: list[str]) -> None:
    with pytest.raises(Rejected):
        decode.containers(names)
