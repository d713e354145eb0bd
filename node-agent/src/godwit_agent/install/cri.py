"""Asks the running containerd which runtime handlers it knows.

``python -m godwit_agent.install.cri SOCKET HANDLER`` exits 0 when it answers and
knows the handler. A process of its own, so that the installer, which stays on
every node, does not carry gRPC.
"""

from __future__ import annotations

import sys

import grpc

_TIMEOUT_SECONDS = 5.0


def knows(reply: bytes, handler: str) -> bool:
    """Whether a serialized ``StatusResponse`` lists ``handler``.

    ``runtime_handlers`` is field 3, the name field 1 of each (cri-api ``api.proto``); the name
    comes first in it, as every encoder writes fields in order.
    """
    name = handler.encode()
    field = b"\x0a" + bytes([len(name)]) + name
    at = reply.find(field)
    while at >= 2:
        if reply[at - 2] == 0x1A and reply[at - 1] >= len(field):
            return True
        at = reply.find(field, at + 1)
    return False


def main(socket: str, handler: str) -> int:
    """0: known, 1: not known, 2: no answer."""
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        status = channel.unary_unary(
            "/runtime.v1.RuntimeService/Status",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            reply = status(b"", timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    return 0 if knows(reply, handler) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
