"""Who is calling: the one DNS name in the caller's certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from godwit_api.errors import Rejected
from godwit_api.identity import OPERATOR_DNS_NAME, node_of_dns_name
from godwit_api.reasons import Reason

# gRPC gives lists of bytes; its stubs say bytes
AuthContext = Mapping[str, Any]

_SAN = "x509_subject_alternative_name"


def caller_name(auth_context: AuthContext) -> str:
    """The caller's name; a certificate with none or several is nobody's."""
    names = list(auth_context.get(_SAN, ()))
    if len(names) != 1:
        raise Rejected(Reason.WRONG_PEER, "the caller's certificate must carry exactly one name")
    return str(names[0], "ascii", "replace")


def require_operator(auth_context: AuthContext) -> None:
    """Only the operator may go on."""
    name = caller_name(auth_context)
    if name != OPERATOR_DNS_NAME:
        raise Rejected(Reason.WRONG_PEER, f"{name} is not the operator")


def require_node(auth_context: AuthContext) -> str:
    """The node whose agent calls. Whether it is the right one, the migration knows."""
    name = caller_name(auth_context)
    node = node_of_dns_name(name)
    if node is None:
        raise Rejected(Reason.WRONG_PEER, f"{name} is no node agent")
    return node


def node_of_certificate(certificate: Mapping[str, object] | None) -> str:
    """The node named by ``SSLSocket.getpeercert()``."""
    names = (certificate or {}).get("subjectAltName", ())
    if not isinstance(names, tuple) or len(names) != 1 or names[0][0] != "DNS":
        raise Rejected(Reason.WRONG_PEER, "the peer's certificate must carry exactly one name")
    node = node_of_dns_name(str(names[0][1]))
    if node is None:
        raise Rejected(Reason.WRONG_PEER, f"{names[0][1]} is no node agent")
    return node
