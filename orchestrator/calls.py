"""How every gRPC call of ours ends: with a response, or with a status that carries the error's code."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc
import grpc.aio

from anabranch.errors import (
    AccessDenied,
    AnabranchError,
    CapacityError,
    ConfigError,
    DeadlineExceeded,
    Draining,
    FfnUnavailable,
    InvalidRequest,
    ModelError,
    NoWorkers,
    RecoveriesExhausted,
    RequestCancelled,
    TransportError,
    UnknownModel,
    WorkerDied,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 2000
CODE_KEY = "anabranch-code"
RETRY_AFTER_KEY = "anabranch-retry-after-s"

_STATUSES: tuple[tuple[type[AnabranchError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    # Not the client's fault, and trying again does not help until the model's files are mended.
    (ModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestCancelled, grpc.StatusCode.CANCELLED),
    (WorkerDied, grpc.StatusCode.UNAVAILABLE),
    # Not UNAVAILABLE, which clients try again by themselves: it would fell as many workers once more.
    (RecoveriesExhausted, grpc.StatusCode.ABORTED),
    (FfnUnavailable, grpc.StatusCode.UNAVAILABLE),
    (NoWorkers, grpc.StatusCode.UNAVAILABLE),
    (Draining, grpc.StatusCode.UNAVAILABLE),
    # Something went wrong between two workers; another try may meet others.
    (TransportError, grpc.StatusCode.UNAVAILABLE),
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Context = grpc.aio.ServicerContext[_Request, _Response]


def _status_of(error: AnabranchError) -> grpc.StatusCode:
    """The status that a client sees; INTERNAL for what has none of its own."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


async def abort(context: _Context[_Request, _Response], error: AnabranchError) -> NoReturn:
    """End the call with the error's status, message and code, and when to try again where it says so."""
    trailers = [(CODE_KEY, error.code)]
    if isinstance(error, CapacityError) and error.retry_after_s is not None:
        trailers.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    await context.abort(_status_of(error), str(error)[:MAX_MESSAGE_CHARS], tuple(trailers))
    raise AssertionError("abort raises")


def answered(
    method: Callable[[_Request], Awaitable[_Response]],
) -> Callable[[_Request | InvalidRequest, _Context[_Request, _Response]], Awaitable[_Response]]:
    """A unary handler around `method`: its errors become statuses."""

    async def handle(message: _Request | InvalidRequest, context: _Context[_Request, _Response]) -> _Response:
        try:
            if isinstance(message, InvalidRequest):
                raise message
            return await method(message)
        except AnabranchError as error:
            # With its traceback it would be part of a circle, and keep a large message until the next collection.
            failure = error.with_traceback(None)
        except Exception:
            logger.exception("a call failed")
            failure = AnabranchError("the orchestrator failed; its log says why")
        await abort(context, failure)

    return handle
