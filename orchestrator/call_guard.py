"""What every call of every service is held to: how many there are, and how long one waits for its client.

    received -> served -> ended
    ^           ^
    |           each message must be taken within `client_stall_s`, or the call is reset
    the request must have come within `client_stall_s`, or the call ends with a status

It stands between gRPC and the handlers as an interceptor. To gRPC every method is one that streams both ways, because
only such a method is called before its request has come, and writes its response itself.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from anabranch.errors import DeadlineExceeded, InvalidRequest, Overloaded
from anabranch.system.clock import timeout
from anabranch.system.logs import LimitedLog
from orchestrator.calls import abort
from orchestrator.reset import reset

logger = logging.getLogger(__name__)

# Of a status that waits for nothing but the socket.
ABORT_TIMEOUT_S = 1.0

_EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]

_RawContext = grpc.aio.ServicerContext[Any, Any]


class ClientStalled(DeadlineExceeded):
    """The client takes nothing any more; its call has been reset."""


class GuardedContext:
    """A call's context, whose waits for the client end. What is not here is the context's own.

    Args:
        context: gRPC's.
        method: its name, for the log.
    """

    def __init__(self, context: _RawContext, method: str, stall_s: float, log: LimitedLog) -> None:
        self._context = context
        self._method = method
        self._stall_s = stall_s
        self._log = log
        self._was_reset = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        """The client's next message, or `grpc.aio.EOF`. Ends the call when none comes, or one that is none."""
        try:
            async with timeout(self._stall_s):
                return await self._context.read()
        except TimeoutError:
            error = DeadlineExceeded(f"client_stall_s: the client sent nothing for {self._stall_s:g} s")
            self._log.warning(f"{self._method} from {self._context.peer()}: {error}")
            await abort(self.as_context, error)
        except DecodeError as error:
            await abort(self.as_context, InvalidRequest(f"the message cannot be read: {error}"))

    async def write(self, message: Any) -> None:
        """Write once the client has room. Raises ClientStalled when it makes none."""
        try:
            # Not wait_for: before Python 3.12 it can lose the cancellation of a client that goes away meanwhile.
            async with timeout(self._stall_s):
                await self._context.write(message)
        except TimeoutError:
            raise self._stalled(f"client_stall_s: the client read nothing for {self._stall_s:g} s") from None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Any, ...] = ()) -> None:
        """End the call with a status; never returns. A call that was reset has its status."""
        if self._was_reset:
            raise asyncio.CancelledError
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._context.abort(code, details, trailing_metadata)
        except TimeoutError:
            self._stalled(details, code)
        except grpc.aio.InternalError as error:
            logger.debug("%s: a status was not sent, the client is gone: %s", self._method, error)
        raise asyncio.CancelledError

    @property
    def as_context(self) -> _RawContext:
        """Itself, for those who ask for gRPC's type."""
        return self  # type: ignore[return-value]

    def _stalled(self, reason: str, status: grpc.StatusCode = grpc.StatusCode.DEADLINE_EXCEEDED) -> ClientStalled:
        self._was_reset = True
        self._log.warning(f"{self._method} from {self._context.peer()} is reset: {reason}")
        reset(self._context, status, reason)
        return ClientStalled(reason)


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """See the module.

    Args:
        max_calls: at a time, of all clients; one more is refused.
        stall_s: longest wait for a client.
        retry_after_s: when who is refused shall try again, in seconds.

    Attributes:
        num_calls: under way now.
    """

    def __init__(self, *, max_calls: int, stall_s: float, retry_after_s: Callable[[], float]) -> None:
        self._max_calls = max_calls
        self._stall_s = stall_s
        self._retry_after_s = retry_after_s
        self._log = LimitedLog(logger)
        self.num_calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return handler
        method = handler_call_details.method

        async def serve(requests: AsyncIterator[Any], context: _RawContext) -> None:
            guarded = GuardedContext(context, method, self._stall_s, self._log)
            self.num_calls += 1
            try:
                await self._serve(handler, guarded)
            except ClientStalled:
                raise asyncio.CancelledError from None
            except grpc.aio.InternalError as error:
                logger.debug("%s: a write failed, its client is gone: %s", method, error)
                raise asyncio.CancelledError from None
            finally:
                self.num_calls -= 1

        return grpc.stream_stream_rpc_method_handler(
            serve,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _serve(self, handler: grpc.RpcMethodHandler[Any, Any], context: GuardedContext) -> None:
        if self.num_calls > self._max_calls:
            error = Overloaded(f"max_calls: {self._max_calls} calls are under way; try again later")
            error.retry_after_s = self._retry_after_s()
            await abort(context.as_context, error)
        argument: Any = _requests(context)
        if not handler.request_streaming:
            argument = await context.read()
            if argument is _EOF:
                await abort(context.as_context, InvalidRequest("the call has no message"))
        behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if inspect.isasyncgenfunction(behavior):
            async for response in behavior(argument, context):
                await context.write(response)
        elif handler.response_streaming:
            await behavior(argument, context)
        else:
            await context.write(await behavior(argument, context))


async def _requests(context: GuardedContext) -> AsyncIterator[Any]:
    """The messages of a client that sends several."""
    while (message := await context.read()) is not _EOF:
        yield message
