"""Gets this node's certificate from the operator, and a new one in time."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from godwit_agent import log
from godwit_agent.server.identity import Identity, IdentityStore
from godwit_api.identity import OPERATOR_DNS_NAME, node_dns_name
from godwit_api.pb import agent_pb2, agent_pb2_grpc

_CALL_TIMEOUT_S = 15.0
_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Enroller:
    """One enrolment; raises ``grpc.RpcError``, ``OSError`` or ``ValueError``."""

    node: str
    address: str
    ca_file: Path
    token_file: Path

    def enroll(self) -> Identity:
        """A new identity for this node; the token and the CA are read anew each time."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = agent_pb2.EnrollRequest(
            csr_pem=self._signing_request(key),
            service_account_token=self.token_file.read_text().strip(),
        )
        credentials = grpc.ssl_channel_credentials(self.ca_file.read_bytes())
        options = [
            ("grpc.ssl_target_name_override", OPERATOR_DNS_NAME),
            ("grpc.enable_http_proxy", 0),
        ]
        with grpc.secure_channel(self.address, credentials, options) as channel:
            stub = agent_pb2_grpc.EnrollmentStub(channel)
            response = stub.Enroll(request, timeout=_CALL_TIMEOUT_S)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        certificate = x509.load_pem_x509_certificate(response.certificate_pem.encode())
        if certificate.public_key() != key.public_key():
            raise ValueError("the operator's certificate is for another key")
        return Identity.of(key_pem, response.certificate_pem.encode(), response.ca_pem.encode())

    def _signing_request(self, key: ec.EllipticCurvePrivateKey) -> str:
        name = node_dns_name(self.node)
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "godwit-agent")]))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        return request.public_bytes(serialization.Encoding.PEM).decode()


class Renewal:
    """Keeps the identity valid; its thread lives as long as the process."""

    def __init__(self, enroller: Enroller, store: IdentityStore) -> None:
        self._enroller = enroller
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="enrolment", daemon=True)

    def start(self) -> None:
        """Enrols now, unless an earlier process left a certificate that is still good."""
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _reuse(self) -> Identity | None:
        try:
            ca_pem = self._enroller.ca_file.read_bytes()
        except OSError:
            return None
        return self._store.load(self._enroller.node, ca_pem)

    def _run(self) -> None:
        identity = self._reuse()
        delay = _FIRST_DELAY_S
        while not self._stop.is_set():
            if identity and time.time() < identity.renew_at():
                self._stop.wait(min(identity.renew_at() - time.time(), 3600.0))
                continue
            try:
                identity = self._enroller.enroll()
            except (grpc.RpcError, OSError, ValueError) as error:
                log.warning("enrolment failed", error=_text(error), retry_s=delay)
                self._stop.wait(delay * random.uniform(0.7, 1.0))  # noqa: S311  jitter, no secret
                delay = min(delay * 2, _MAX_DELAY_S)
                continue
            delay = _FIRST_DELAY_S
            self._store.set(identity)
            log.info("enrolled", node=self._enroller.node, not_after=round(identity.not_after))


def _text(error: Exception) -> str:
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
