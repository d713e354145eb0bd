"""Certificates for the agents: the Enrollment service, and the operator's own.

A caller proves its node by a service-account token bound to its pod: the API
server vouches for the node that the pod runs on. What the request says of
itself counts for nothing.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
from cryptography import x509

from godwit_api.errors import GodwitError
from godwit_api.identity import ENROLLMENT_AUDIENCE, node_dns_name
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pb.agent_pb2_grpc import (
    EnrollmentServicer,
    add_EnrollmentServicer_to_server,
)
from godwit_operator.agents import Identity
from godwit_operator.kube import (
    CONFIG_MAPS,
    SECRETS,
    TOKEN_REVIEWS,
    ConflictError,
    KubeApi,
    find,
)
from godwit_operator.pki import LEAF_LIFE, Authority, BadRequestError, Pair, new_authority
from godwit_operator.rule import MANAGED_BY

NAME = "godwit-ca"
NODE_EXTRA = "authentication.kubernetes.io/node-name"
_MAX_TOKEN = 16 * 1024
log = logging.getLogger(__name__)


async def load_authority(api: KubeApi, namespace: str) -> Authority:
    """The authority in Secret ``godwit-ca``; made when there is none. Publishes its certificate."""
    secret = await find(api, SECRETS, namespace, NAME)
    if secret is None:
        pair = new_authority()
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": NAME, "labels": MANAGED_BY},
            "data": {
                "tls.key": base64.b64encode(pair.key).decode(),
                "tls.crt": base64.b64encode(pair.certificate).decode(),
            },
        }
        try:
            secret = await api.create(SECRETS, namespace, body)
            log.info("certificate authority made", extra={"secret": NAME})
        except ConflictError:
            secret = await api.get(SECRETS, namespace, NAME)
    data = {key: base64.b64decode(value) for key, value in secret["data"].items()}
    authority = Authority(Pair(data["tls.key"], data["tls.crt"]))
    await publish(api, namespace, authority.pem.decode())
    return authority


async def publish(api: KubeApi, namespace: str, pem: str) -> None:
    """ConfigMap ``godwit-ca``, which agents mount."""
    wanted = {"ca.crt": pem}
    known = await find(api, CONFIG_MAPS, namespace, NAME)
    if known is None:
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": NAME, "labels": MANAGED_BY},
            "data": wanted,
        }
        try:
            await api.create(CONFIG_MAPS, namespace, body)
            return
        except ConflictError:
            pass
    if known is None or known.get("data") != wanted:
        await api.patch(CONFIG_MAPS, namespace, NAME, {"data": wanted})


class OperatorIdentity:
    """The operator's own certificate, renewed when a third of its life is left."""

    def __init__(self, authority: Authority, names: list[str]) -> None:
        self._authority = authority
        self._names = names
        self._pair = authority.pair(names)
        self._identity = self._make()

    def _make(self) -> Identity:
        return Identity(self._pair.key, self._pair.certificate, self._authority.pem)

    def current(self) -> Identity:
        """Valid for hours to come; the same object until it is renewed."""
        if self._pair.not_after - datetime.now(UTC) < LEAF_LIFE / 3:
            self._pair = self._authority.pair(self._names)
            self._identity = self._make()
            log.info("operator certificate renewed", extra={"until": str(self._pair.not_after)})
        return self._identity


class RefusedError(Exception):
    """The token does not prove what it should."""


def node_of(status: Mapping[str, Any], user: str) -> str:
    """Node that a TokenReview's status vouches for. Raises RefusedError. Pure."""
    if not status.get("authenticated"):
        raise RefusedError("the token is not valid")
    if ENROLLMENT_AUDIENCE not in (status.get("audiences") or []):
        raise RefusedError(f"the token is not for audience {ENROLLMENT_AUDIENCE}")
    known = status.get("user") or {}
    if known.get("username") != user:
        raise RefusedError(f"the token belongs to {known.get('username')}, not to {user}")
    nodes = (known.get("extra") or {}).get(NODE_EXTRA) or []
    if len(nodes) != 1 or not nodes[0]:
        raise RefusedError("the token is not bound to a pod on a node")
    return str(nodes[0])


class Enrollment(EnrollmentServicer):
    """Issues each agent the name of its own node."""

    def __init__(self, api: KubeApi, authority: Authority, user: str) -> None:
        self._api = api
        self._authority = authority
        self._user = user

    async def Enroll(  # noqa: N802 -- the name in the proto file
        self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EnrollResponse:
        if not 0 < len(request.service_account_token) <= _MAX_TOKEN:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "service_account_token")
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": request.service_account_token, "audiences": [ENROLLMENT_AUDIENCE]},
        }
        try:
            review = await self._api.create(TOKEN_REVIEWS, None, body)
        except GodwitError as failure:
            await context.abort(grpc.StatusCode.UNAVAILABLE, failure.message)
            raise
        try:
            node = node_of(review.get("status", {}), self._user)
            certificate = self._authority.sign_request(request.csr_pem, node_dns_name(node))
        except RefusedError as refused:
            log.warning("enrolment refused", extra={"cause": str(refused)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(refused))
            raise
        except BadRequestError as refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(refused))
            raise
        until = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
        log.info("agent enrolled", extra={"node": node, "until": str(until)})
        return pb.EnrollResponse(
            certificate_pem=certificate.decode(),
            ca_pem=self._authority.pem.decode(),
            not_after_unix=int(until.timestamp()),
        )


async def serve(
    service: Enrollment, identity: OperatorIdentity, address: str
) -> tuple[grpc.aio.Server, int]:
    """Start the Enrollment server; new connections get the current certificate."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        now = identity.current()
        return grpc.ssl_server_certificate_configuration([(now.key, now.chain)])

    credentials = grpc.dynamic_ssl_server_credentials(configuration(), configuration)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 1024)])
    add_EnrollmentServicer_to_server(service, server)
    port = server.add_secure_port(address, credentials)
    await server.start()
    return server, port
