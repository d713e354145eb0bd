"""The one place where a call's errors become a gRPC status."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from godwit_agent import log
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.reasons import Reason
from godwit_api.wire import status_of

T = TypeVar("T")
_NO_DEADLINE_S = 86_400.0


class LongCalls:
    """Calls that hold a thread for long may hold some of them only: a thread must always be
    free for the other agent, which waits inside a freeze."""

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise Retryable(Reason.IN_PROGRESS, "this agent serves too many long calls")
        try:
            yield
        finally:
            self._free.release()


def deadline(context: grpc.ServicerContext) -> float:
    """``time.monotonic()`` until which the caller waits; a call without one is refused."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _NO_DEADLINE_S:
        raise Rejected(Reason.MALFORMED, "every call needs a deadline (at most one day)")
    return time.monotonic() + remaining


def answer(context: grpc.ServicerContext, name: str, work: Callable[[], T]) -> T:
    """Runs ``work``; an error of it ends the call with the status that carries it."""
    try:
        return work()
    except GodwitError as error:
        failure = error
    except Exception as error:
        failure = _unexpected(name, error)
    raise _abort(context, name, failure)


def stream(
    context: grpc.ServicerContext, name: str, work: Callable[[], Iterator[T]]
) -> Iterator[T]:
    """The same for a stream of answers."""
    try:
        yield from work()
    except GodwitError as error:
        failure = error
    except Exception as error:
        failure = _unexpected(name, error)
    else:
        return
    raise _abort(context, name, failure)


def _unexpected(name: str, error: Exception) -> GodwitError:
    log.exception("call failed unexpectedly", call=name)
    return Retryable(Reason.INTERNAL, f"{type(error).__name__}: {error}", delay_seconds=5.0)


def _abort(context: grpc.ServicerContext, name: str, error: GodwitError) -> AssertionError:
    code, message, metadata = status_of(error)
    log.warning("call refused", call=name, code=code.name, reason=error.reason, message=message)
    context.set_trailing_metadata(metadata)
    context.abort(code, message)
    return AssertionError("abort raises")
