"""The agent's certificate: where it is kept and how TLS uses it.

The private key is made here and never leaves the node: it lies in a 0700
directory (a tmpfs on a node), because ``ssl`` reads keys from files only. gRPC
and the transfer stream use the same certificate; a renewed one is taken by new
connections, established ones keep theirs.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509

from godwit_api.errors import Retryable
from godwit_api.identity import node_dns_name
from godwit_api.reasons import Reason

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key and the authority that made it. PEM."""

    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes
    not_before: float
    not_after: float

    @classmethod
    def of(cls, key_pem: bytes, certificate_pem: bytes, ca_pem: bytes) -> Identity:
        """Takes the times from the certificate."""
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        return cls(
            key_pem,
            certificate_pem,
            ca_pem,
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )

    def renew_at(self) -> float:
        """When two thirds of its life are over (Unix seconds)."""
        return self.not_before + (self.not_after - self.not_before) * 2 / 3

    def __repr__(self) -> str:
        return f"Identity(not_after={self.not_after:.0f})"


class IdentityStore:
    """The current identity; waits for the first one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._identity: Identity | None = None
        self._version = 0
        self._changed = threading.Condition()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)

    def load(self, node: str, ca_pem: bytes) -> Identity | None:
        """What an earlier process left, if it is of this node and authority and not over."""
        try:
            both = self._path("identity").read_bytes()
            cut = both.index(_CERTIFICATE)
            identity = Identity.of(both[:cut], both[cut:], self._path("ca").read_bytes())
            known = set(x509.load_pem_x509_certificates(ca_pem))
            same = known & set(x509.load_pem_x509_certificates(identity.ca_pem))
            names = _dns_names(identity.certificate_pem)
        except (OSError, ValueError, x509.ExtensionNotFound):
            return None
        if not same or names != [node_dns_name(node)] or identity.renew_at() <= time.time():
            return None
        self._publish(identity)
        return identity

    def set(self, identity: Identity) -> None:
        """From now on new connections use ``identity``."""
        # key and certificate in one file: a reader never sees two that do not match
        _write_private(self._path("identity"), identity.key_pem + identity.certificate_pem)
        _write_private(self._path("ca"), identity.ca_pem)
        self._publish(identity)

    def ready(self, timeout_s: float) -> bool:
        """Waits for the first identity."""
        with self._changed:
            return self._changed.wait_for(lambda: self._identity is not None, timeout_s)

    def wait(self, timeout_s: float) -> Identity:
        """The current identity."""
        with self._changed:
            self._changed.wait_for(lambda: self._identity is not None, timeout_s)
            if self._identity is None:
                raise Retryable(Reason.AGENT_UNREACHABLE, "this agent has no certificate yet")
            return self._identity

    def server_credentials(self) -> grpc.ServerCredentials:
        """gRPC: TLS with the certificate of the moment; clients must show one, too."""
        first = self.wait(0)
        seen = self._version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            with self._changed:
                if seen == self._version or self._identity is None:
                    return None  # the one before stays
                seen = self._version
                return _configuration(self._identity)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(first),
            fetch,  # type: ignore[arg-type]  # the stubs do not know None
            require_client_authentication=True,
        )

    def channel(self, address: str, port: int, dns_name: str) -> grpc.Channel:
        """A channel whose server must be ``dns_name``."""
        identity = self.wait(0)
        credentials = grpc.ssl_channel_credentials(
            identity.ca_pem, identity.key_pem, identity.certificate_pem
        )
        options = [
            ("grpc.ssl_target_name_override", dns_name),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # despite its name also the time that one attempt with its handshake may take
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        return grpc.secure_channel(f"{address}:{port}", credentials, options)

    def node_channel(self, address: str, port: int, node: str) -> grpc.Channel:
        """A channel to the agent of ``node``."""
        return self.channel(address, port, node_dns_name(node))

    def transfer_context(self, *, server: bool) -> ssl.SSLContext:
        """TLS 1.3 for the transfer stream, both ends with a certificate."""
        self.wait(0)
        purpose = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self._path("ca"))
        context.load_cert_chain(self._path("identity"))
        if server:
            context.num_tickets = 0
        return context

    def _publish(self, identity: Identity) -> None:
        with self._changed:
            self._identity = identity
            self._version += 1
            self._changed.notify_all()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.pem"


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    pairs = [(identity.key_pem, identity.certificate_pem)]
    return grpc.ssl_server_certificate_configuration(pairs, identity.ca_pem)


def _dns_names(certificate_pem: bytes) -> list[str]:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def _write_private(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    temporary.rename(path)
