"""Certificates name what they should, and nothing that a request claims."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from godwit_api.identity import ENROLLMENT_AUDIENCE, OPERATOR_DNS_NAME
from godwit_operator.enrollment import (
    NODE_EXTRA,
    OperatorIdentity,
    RefusedError,
    node_of,
)
from godwit_operator.pki import LEAF_LIFE, Authority, BadRequestError, Pair, new_authority

USER = "system:serviceaccount:godwit-system:godwit-node-agent"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority(new_authority())


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OPERATOR_DNS_NAME)])
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(OPERATOR_DNS_NAME)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


def names(pem: bytes) -> list[str]:
    certificate = x509.load_pem_x509_certificate(pem)
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return found.value.get_values_for_type(x509.DNSName)


def test_the_names_of_a_request_are_ignored(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = authority.sign_request(request(key), "n1.node.godwit.internal")
    assert names(pem) == ["n1.node.godwit.internal"]
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.public_key() == key.public_key()
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))


def test_bad_requests(authority: Authority) -> None:
    with pytest.raises(BadRequestError):
        authority.sign_request("nonsense", "n")
    with pytest.raises(BadRequestError):
        authority.sign_request(request(rsa.generate_private_key(65537, 2048)), "n")


def test_a_forged_signature_is_refused(authority: Authority) -> None:
    pem = request(ec.generate_private_key(ec.SECP256R1()))
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER))
    der[-3] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(BadRequestError):
        authority.sign_request(forged.decode(), "n")


def test_long_node_names(authority: Authority) -> None:
    name = "a" * 60 + "." + "b" * 60 + ".node.godwit.internal"
    assert names(authority.pair([name]).certificate) == [name]


def test_key_and_certificate_must_belong_together() -> None:
    one, two = new_authority(), new_authority()
    with pytest.raises(ValueError, match="belong"):
        Authority(Pair(one.key, two.certificate))


def test_the_operator_renews_in_time(authority: Authority) -> None:
    identity = OperatorIdentity(authority, [OPERATOR_DNS_NAME])
    first = identity.current()
    assert identity.current() is first
    assert OPERATOR_DNS_NAME in names(first.chain)
    old = datetime.now(UTC) - LEAF_LIFE + timedelta(hours=1)
    identity._pair = authority.pair(["x"], old)
    assert identity.current() is not first


def review(**changes: object) -> dict[str, object]:
    status: dict[str, object] = {
        "authenticated": True,
        "audiences": [ENROLLMENT_AUDIENCE],
        "user": {"username": USER, "extra": {NODE_EXTRA: ["n1"]}},
    }
    return status | changes


def test_a_bound_token_names_its_node() -> None:
    assert node_of(review(), USER) == "n1"


@pytest.mark.parametrize(
    "status",
    [
        review(authenticated=False),
        review(audiences=[]),
        review(audiences=["https://kubernetes.default.svc"]),
        review(user={"username": "system:serviceaccount:godwit-system:default"}),
        review(user={"username": USER}),
        review(user={"username": USER, "extra": {NODE_EXTRA: []}}),
        {},
    ],
)
def test_other_tokens_are_refused(status: dict[str, object]) -> None:
    with pytest.raises(RefusedError):
        node_of(status, USER)
