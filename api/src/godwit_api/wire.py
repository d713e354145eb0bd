"""Errors on gRPC: one mapping, used by both ends of every call.

============  ===================  ==========================================
decision      status code          why this code
============  ===================  ==========================================
Rejected      FAILED_PRECONDITION  the same request fails again (``Malformed``
                                   goes as INVALID_ARGUMENT, ``WrongPeer`` as
                                   PERMISSION_DENIED)
Retryable     UNAVAILABLE          the same request may succeed later
Aborted       ABORTED              start a new attempt
Unsafe        DATA_LOSS            going on could lose or double the process
============  ===================  ==========================================

The reason travels in the trailing metadata ``godwit-reason``, the delay of a
``Retryable`` in ``godwit-retry-ms``; the status message is for people. A
status without our metadata comes from gRPC itself (or from a bug behind it)
and says nothing about what was done: it becomes ``Retryable``, since every
call is idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import grpc

from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable, Unsafe
from godwit_api.reasons import Reason

REASON_KEY = "godwit-reason"
RETRY_KEY = "godwit-retry-ms"
_MAX_MESSAGE = 2000

Metadata = tuple[tuple[str, str], ...]


class RpcFailure(Protocol):
    """What a failed call tells; a ``grpc.RpcError`` of the client API has it."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def status_of(error: GodwitError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Status code, message and trailing metadata that carry ``error``."""
    metadata: Metadata = ((REASON_KEY, error.reason.value),)
    match error:
        case Rejected(reason=Reason.MALFORMED):
            code = grpc.StatusCode.INVALID_ARGUMENT
        case Rejected(reason=Reason.WRONG_PEER):
            code = grpc.StatusCode.PERMISSION_DENIED
        case Rejected():
            code = grpc.StatusCode.FAILED_PRECONDITION
        case Retryable():
            code = grpc.StatusCode.UNAVAILABLE
            metadata = (*metadata, (RETRY_KEY, str(round(error.delay_seconds * 1000))))
        case Aborted():
            code = grpc.StatusCode.ABORTED
        case _:
            code = grpc.StatusCode.DATA_LOSS
    return code, error.message[:_MAX_MESSAGE], metadata


def error_of(failure: grpc.RpcError | RpcFailure) -> GodwitError:
    """The decision behind a failed call; never raises."""
    rpc = cast(RpcFailure, failure)
    code, message = rpc.code(), rpc.details() or ""
    metadata = {key: _text(value) for key, value in rpc.trailing_metadata() or ()}
    try:
        reason = Reason(metadata[REASON_KEY])
    except (KeyError, ValueError):
        return _foreign(code, message)
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return Retryable(reason, message, delay_seconds=_delay(metadata.get(RETRY_KEY)))
        case grpc.StatusCode.ABORTED:
            return Aborted(reason, message)
        case grpc.StatusCode.DATA_LOSS:
            return Unsafe(reason, message)
        case (
            grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.PERMISSION_DENIED
        ):
            return Rejected(reason, message)
    return _foreign(code, message)


def _foreign(code: grpc.StatusCode, message: str) -> GodwitError:
    text = f"{code.name}: {message}" if message else code.name
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return Retryable(Reason.AGENT_UNREACHABLE, text)
        case grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Retryable(Reason.TIMED_OUT, text)
        case grpc.StatusCode.UNIMPLEMENTED:
            return Rejected(Reason.VERSION_DIFFERS, text)
    return Retryable(Reason.INTERNAL, text, delay_seconds=5.0)


def _delay(text: str | None) -> float:
    return int(text) / 1000 if text and text.isascii() and text.isdecimal() else 1.0


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
