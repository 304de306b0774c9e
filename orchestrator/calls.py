"""How every gRPC call of ours ends: with a response, or with a status that carries the error's code."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc.aio

from anabranch.errors import AnabranchError, InvalidRequest
from orchestrator.statuses import status_of, trailers_of

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 2000

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Context = grpc.aio.ServicerContext[_Request, _Response]


async def abort(context: _Context[_Request, _Response], error: AnabranchError) -> NoReturn:
    """End the call with the error's status, message and code."""
    await context.abort(status_of(error), str(error)[:MAX_MESSAGE_CHARS], trailers_of(error))
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
