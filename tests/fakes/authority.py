"""A certificate authority for tests."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from godwit_agent.server.identity import Identity, IdentityStore
from godwit_api.identity import node_dns_name

_NO_ENCRYPTION = serialization.NoEncryption()


class Authority:
    """Signs certificates with one DNS name each."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "godwit test authority")])
        self._certificate = self._build(self._name, self._key.public_key(), [], ca=True)

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def identity(self, *names: str) -> Identity:
        """A key and a certificate for ``names``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        certificate = self._build(subject, key.public_key(), list(names), ca=False)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, _NO_ENCRYPTION
        )
        return Identity.of(pem, certificate.public_bytes(serialization.Encoding.PEM), self.pem)

    def sign(self, csr_pem: str) -> str:
        """A certificate for the names of a signing request."""
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = san.get_values_for_type(x509.DNSName)
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = self._build(csr.subject, key, names, ca=False)
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def store(self, directory: Path, *names: str) -> IdentityStore:
        """An identity store that holds a certificate for ``names``."""
        store = IdentityStore(directory)
        store.set(self.identity(*names))
        return store

    def node_store(self, directory: Path, node: str) -> IdentityStore:
        return self.store(directory, node_dns_name(node))

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, names: list[str], *, ca: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        constraints = x509.BasicConstraints(ca=ca, path_length=None)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(constraints, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if ca:
            usage = x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            )
            builder = builder.add_extension(usage, critical=True)
        if names:
            san = x509.SubjectAlternativeName([_general(name) for name in names])
            builder = builder.add_extension(san, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
