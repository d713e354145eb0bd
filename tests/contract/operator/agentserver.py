"""Fake agents behind real gRPC servers with the operator's own certificates."""

# ruff: noqa: N802 -- the names of the proto file

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from contract.operator.world import FakeAgent
from godwit_api.errors import GodwitError
from godwit_api.identity import OPERATOR_DNS_NAME
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb.agent_pb2_grpc import (
    EnrollmentStub,
    NodeAgentServicer,
    add_NodeAgentServicer_to_server,
)
from godwit_api.wire import status_of


def request_for(name: str) -> tuple[bytes, str]:
    """A key and a signing request that claims ``name``."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem, request.public_bytes(serialization.Encoding.PEM).decode()


async def enroll(address: str, authority: bytes, csr: str, token: str) -> pb.EnrollResponse:
    """What an agent does first."""
    options = [("grpc.ssl_target_name_override", OPERATOR_DNS_NAME)]
    credentials = grpc.ssl_channel_credentials(authority)
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        request = pb.EnrollRequest(csr_pem=csr, service_account_token=token)
        answer: pb.EnrollResponse = await EnrollmentStub(channel).Enroll(request, timeout=5)
        return answer


class AgentServer(NodeAgentServicer):
    """NodeAgent over a FakeAgent."""

    def __init__(self, agent: FakeAgent) -> None:
        self._agent = agent

    async def _answer(self, context: Any, answer: Any, empty: Any) -> Any:
        try:
            found = await answer
        except GodwitError as failure:
            code, message, metadata = status_of(failure)
            await context.abort(code, message, trailing_metadata=metadata)
        return empty if found is None else found

    async def GetNode(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.get_node(), None)

    async def CheckSource(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.check_source(request), None)

    async def CheckTarget(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.check_target(request), None)

    async def PrepareTarget(self, request: Any, context: Any) -> Any:
        empty = pb.PrepareTargetResponse()
        return await self._answer(context, self._agent.prepare_target(request), empty)

    async def Copy(self, request: Any, context: Any) -> AsyncIterator[pb.CopyProgress]:
        async for progress in self._agent.copy(request, context.time_remaining()):
            yield progress

    async def Guard(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.guard(request), pb.GuardResponse())

    async def ExpectPod(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.expect_pod(request), pb.ExpectPodResponse())

    async def AwaitGate(self, request: Any, context: Any) -> Any:
        answer = self._agent.await_gate(request, context.time_remaining())
        return await self._answer(context, answer, pb.AwaitGateResponse())

    async def Switch(self, request: Any, context: Any) -> Any:
        return await self._answer(
            context, self._agent.switch(request, context.time_remaining()), None
        )

    async def FinishSource(self, request: Any, context: Any) -> Any:
        empty = pb.FinishSourceResponse()
        return await self._answer(context, self._agent.finish_source(request), empty)

    async def FinishTarget(self, request: Any, context: Any) -> Any:
        empty = pb.FinishTargetResponse()
        return await self._answer(context, self._agent.finish_target(request), empty)

    async def AbortSource(self, request: Any, context: Any) -> Any:
        empty = pb.AbortSourceResponse()
        return await self._answer(context, self._agent.abort_source(request), empty)

    async def AbortTarget(self, request: Any, context: Any) -> Any:
        empty = pb.AbortTargetResponse()
        return await self._answer(context, self._agent.abort_target(request), empty)

    async def GetMigration(self, request: Any, context: Any) -> Any:
        records = await self._answer(context, self._agent.get_migration(request.uid), None)
        return pb.GetMigrationResponse(records=records)

    async def RunFenced(self, request: Any, context: Any) -> Any:
        return await self._answer(context, self._agent.run_fenced(request), pb.RunResponse())

    async def SyncAddresses(self, request: Any, context: Any) -> Any:
        empty = pb.SyncAddressesResponse()
        return await self._answer(context, self._agent.sync_addresses(request), empty)


async def serve_agent(agent: FakeAgent, address: str, key: bytes, answer: pb.EnrollResponse) -> Any:
    """An mTLS server that wants certificates of the same authority."""
    pair = (key, answer.certificate_pem.encode())
    credentials = grpc.ssl_server_credentials(
        [pair], root_certificates=answer.ca_pem.encode(), require_client_auth=True
    )
    server = grpc.aio.server()
    add_NodeAgentServicer_to_server(AgentServer(agent), server)
    server.add_secure_port(address, credentials)
    await server.start()
    return server
