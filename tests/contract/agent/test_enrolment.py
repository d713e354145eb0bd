"""The agent gets its certificate from an operator that is not always there."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes.authority import Authority
from fakes.host import FakeNode, World
from godwit_agent import main as agent_main
from godwit_agent.server import enroll
from godwit_agent.server.enroll import Enroller, Renewal
from godwit_agent.server.identity import IdentityStore
from godwit_api.identity import OPERATOR_DNS_NAME, node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb import agent_pb2_grpc


class Operator(agent_pb2_grpc.EnrollmentServicer):
    """Signs whatever comes with the right token."""

    def __init__(self, authority: Authority, name: str = OPERATOR_DNS_NAME) -> None:
        self.authority = authority
        self.calls = 0
        identity = authority.identity(name)
        self._server = grpc.server(ThreadPoolExecutor(2))
        agent_pb2_grpc.add_EnrollmentServicer_to_server(self, self._server)
        credentials = grpc.ssl_server_credentials([(identity.key_pem, identity.certificate_pem)])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def Enroll(self, request: pb.EnrollRequest, context: grpc.ServicerContext) -> pb.EnrollResponse:  # noqa: N802
        self.calls += 1
        if request.service_account_token != "token":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "who are you?")
        certificate = self.authority.sign(request.csr_pem)
        return pb.EnrollResponse(certificate_pem=certificate, ca_pem=self.authority.pem.decode())

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def operator() -> Iterator[Operator]:
    operator = Operator(Authority())
    yield operator
    operator.stop()


@pytest.fixture
def files(tmp_path: Path, operator: Operator) -> Path:
    (tmp_path / "ca.crt").write_bytes(operator.authority.pem)
    (tmp_path / "token").write_text("token\n")
    return tmp_path


def enroller(files: Path, port: int) -> Enroller:
    return Enroller("node-a", f"127.0.0.1:{port}", files / "ca.crt", files / "token")


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_node_gets_its_name(files: Path, operator: Operator) -> None:
    identity = enroller(files, operator.port).enroll()
    store = IdentityStore(files / "id")
    store.set(identity)
    assert store.load("node-a", operator.authority.pem) is not None
    assert store.load("node-b", operator.authority.pem) is None
    assert store.load("node-a", Authority().pem) is None
    assert (files / "id").stat().st_mode & 0o777 == 0o700
    assert (files / "id" / "identity.pem").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in repr(identity).encode()


def test_a_wrong_operator_learns_no_token(files: Path, operator: Operator) -> None:
    impostor = Operator(operator.authority, node_dns_name("node-b"))
    with pytest.raises(grpc.RpcError):
        enroller(files, impostor.port).enroll()
    assert impostor.calls == 0
    impostor.stop()


def test_it_waits_until_the_operator_serves(
    files: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enroll, "_FIRST_DELAY_S", 0.05)
    (files / "token").write_text("not yet")
    store = IdentityStore(files / "id")
    renewal = Renewal(enroller(files, operator.port), store)
    renewal.start()
    eventually(lambda: operator.calls > 1)
    assert not store.ready(0)
    (files / "token").write_text("token")
    assert store.ready(15)
    renewal.stop()
    # the next process needs no operator
    count = operator.calls
    again = IdentityStore(files / "id")
    second = Renewal(enroller(files, operator.port), again)
    second.start()
    assert again.ready(15)
    second.stop()
    assert operator.calls == count


def test_a_certificate_is_renewed(
    files: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the test authority dates certificates back by a minute
    soon = "godwit_agent.server.identity.Identity.renew_at"
    monkeypatch.setattr(soon, lambda self: self.not_before + 60.3)
    store = IdentityStore(files / "id")
    renewal = Renewal(enroller(files, operator.port), store)
    renewal.start()
    eventually(lambda: operator.calls >= 3)
    renewal.stop()


def test_the_whole_process(
    files: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode(World(), "node-a")
    monkeypatch.setattr(agent_main, "_host", lambda config: node.host())
    handlers: dict[int, Callable[[int, None], None]] = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: handlers.update({number: handler})
    )
    for name, value in {
        "NODE_NAME": "node-a",
        "NODE_IP": "127.0.0.1",
        "ENROLLMENT_ADDRESS": f"127.0.0.1:{operator.port}",
        "CONTROL_PORT": "19460",
        "TRANSFER_PORT": "19461",
        "HEALTH_PORT": "19463",
        "CA_FILE": str(files / "ca.crt"),
        "TOKEN_FILE": str(files / "token"),
        "IDENTITY_DIR": str(files / "id"),
        "RUN_DIR": str(files / "run"),
        "JOURNAL_DIR": str(files / "journal"),
    }.items():
        monkeypatch.setenv(f"GODWIT_{name}", value)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(agent_main.main()))
    thread.start()
    with grpc.insecure_channel("127.0.0.1:19463") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def ready() -> bool:
            try:
                request = health_pb2.HealthCheckRequest(service="ready")
                answer = stub.Check(request, timeout=2, wait_for_ready=True)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        eventually(ready)
    identity = operator.authority.store(files / "op", OPERATOR_DNS_NAME)
    with identity.node_channel("127.0.0.1", 19460, "node-a") as channel:
        report = agent_pb2_grpc.NodeAgentStub(channel).GetNode(pb.GetNodeRequest(), timeout=10)
        assert report.node == "node-a"
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    thread.join(30)
    assert codes == [0]
