"""Names in certificates, and what they may do.

The operator is the certificate authority. A node agent proves its node once
with its bound service-account token and then holds a certificate whose only
DNS name is ``<node>.node.godwit.internal``. Both ends of every connection show
a certificate of this authority; the name decides what they may call.
"""

from __future__ import annotations

OPERATOR_DNS_NAME = "operator.godwit.internal"
_NODE_SUFFIX = ".node.godwit.internal"
ENROLLMENT_AUDIENCE = "godwit-operator"

AGENT_CONTROL_PORT = 9460
AGENT_TRANSFER_PORT = 9461
OPERATOR_ENROLLMENT_PORT = 9462


def node_dns_name(node: str) -> str:
    """Certificate name of the agent on ``node`` (a Kubernetes node name)."""
    return f"{node}{_NODE_SUFFIX}"


def node_of_dns_name(name: str) -> str | None:
    """Node whose agent carries ``name``; None when it is no agent's name."""
    if not name.endswith(_NODE_SUFFIX):
        return None
    return name.removesuffix(_NODE_SUFFIX) or None
