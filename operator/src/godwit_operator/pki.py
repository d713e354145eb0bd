"""The certificate authority: issues names, nothing else. Pure, but for the clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(hours=24)
_SKEW = timedelta(minutes=5)
_BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class BadRequestError(ValueError):
    """A certificate signing request that cannot be served."""


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate, PEM."""

    key: bytes
    certificate: bytes

    @property
    def not_after(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


def new_authority(now: datetime | None = None) -> Pair:
    """A self-signed authority, ECDSA P-256, ten years."""
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Godwit")])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(_key_pem(key), certificate.public_bytes(serialization.Encoding.PEM))


class Authority:
    """Signs with one authority pair."""

    def __init__(self, pair: Pair) -> None:
        self.pem = pair.certificate
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the authority's key is not an elliptic curve key")
        if key.public_key() != self._certificate.public_key():
            raise ValueError("the authority's key does not belong to its certificate")
        self._key = key

    def sign(
        self, public_key: ec.EllipticCurvePublicKey, names: list[str], now: datetime | None = None
    ) -> bytes:
        """A leaf certificate for exactly ``names``, PEM."""
        now = now or datetime.now(UTC)
        end = min(now + LEAF_LIFE, self._certificate.not_valid_after_utc)
        # CN is limited to 64 characters and means nothing here
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_BOTH, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def pair(self, names: list[str], now: datetime | None = None) -> Pair:
        """A new key with a certificate for ``names``."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Pair(_key_pem(key), self.sign(key.public_key(), names, now))

    def sign_request(self, pem: str, name: str, now: datetime | None = None) -> bytes:
        """A certificate for the key of a request. The names in it are ignored."""
        try:
            request = x509.load_pem_x509_csr(pem.encode())
        except ValueError as cause:
            raise BadRequestError("the certificate signing request cannot be read") from cause
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size < 256:
            raise BadRequestError("the key must be an elliptic curve key of 256 bits or more")
        if not request.is_signature_valid:
            raise BadRequestError("the signature of the certificate signing request is wrong")
        return self.sign(key, [name], now)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
