"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
import grpc.aio

from anabranch_client import convert
from anabranch_client.calls import (
    HEALTH_CHECK,
    INFERENCE,
    KEEPALIVE_S,
    channel_options,
    endpoint_of,
    health_request,
    health_response,
    timeout_of,
    timeout_or,
)
from anabranch_client.errors import CallCancelled, ClientError, code_of, error_of, retry_after_of
from anabranch_client.types import ChatMessage, Completion, Event, Health, Model, Prompt, Sampling
from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc

_Result = TypeVar("_Result")


def _mapped(error: grpc.aio.AioRpcError) -> ClientError:
    trailers = error.trailing_metadata()
    return error_of(error.code(), error.details(), code_of(trailers), retry_after_of(trailers))


async def _mapped_await(awaitable: Awaitable[_Result]) -> _Result:
    """Await a call's next result; errors become the SDK's.

    grpc.aio raises CancelledError also when the *server* ended the call with CANCELLED; a task that nobody
    cancelled must not see that.
    """
    try:
        return await awaitable
    except grpc.aio.AioRpcError as error:
        raise _mapped(error) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CallCancelled("the call was cancelled", code="cancelled") from None


class AsyncStream(AsyncIterator[Event]):
    """One answer's events: Accepted, Tokens..., Finished. Closing or dropping it before the end cancels the call.

    Raises (from iteration): ClientError.
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateEvent]) -> None:
        self._call = call
        self._events = aiter(call)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        return convert.from_event(await _mapped_await(anext(self._events)))

    async def aclose(self) -> None:
        """Cancel the call, unless it has ended. Idempotent."""
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._call.cancel()


class AsyncClient:
    """A client of one Anabranch endpoint; made and used inside one event loop.

    Args:
        endpoint: `host:port` or `unix:path`.
        timeout_s: deadline of a whole answer, unless the call gives its own.
        call_timeout_s: deadline of the short calls.
        keepalive_s: silence during a call after which the server is asked for a sign of life; where none comes for
            as long again, the call ends with Unavailable (`unresponsive`). Servers allow no less than 5 s.
        credentials: for TLS; None: no encryption.

    Raises:
        InvalidRequest: a deadline is not above 0 and at most a day, as for each call's own; or the endpoint is none.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout_s: float = 600.0,
        call_timeout_s: float = 30.0,
        keepalive_s: float = KEEPALIVE_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.endpoint = endpoint_of(endpoint)
        self._timeout_s = timeout_of("timeout_s", timeout_s)
        self._call_timeout_s = timeout_of("call_timeout_s", call_timeout_s)
        options = channel_options(keepalive_s)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.endpoint, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self.endpoint, credentials, options=options)
        self._stub = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = self._channel.unary_unary(
            HEALTH_CHECK, request_serializer=health_request, response_deserializer=health_response
        )

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Start an answer and give its events as they come.

        Args:
            prompt: text, token ids, or the turns of a chat.
            request_id: names the request in `Accepted` and in the server's log, and need not be unique; None lets
                the server draw one.
            cache_salt: the prompt's KV is shared with requests of the same salt alone; None is one of them. Give one
                to each party that must not learn from a faster answer what others have asked.
            priority: lower goes first, -100 to 100; a request that waits catches up with time.
            tenant: who asks; tenants share the cluster by tokens served. None is one of them.
            idempotency_key: a second request with it gets the first one's answer, from its beginning, while that runs
                or is remembered. A request with a key goes on for a while after its stream was closed.
            timeout_s: deadline of the whole answer; work that could not meet it is not begun.

        Raises:
            InvalidRequest: the message cannot even be built, or timeout_s is no time to wait; all else is raised by
                the stream.
        """
        request = convert.to_generate(
            prompt,
            sampling,
            request_id=request_id,
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
            idempotency_key=idempotency_key,
        )
        return AsyncStream(self._stub.Generate(request, timeout=timeout_or(timeout_s, self._timeout_s)))

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Completion:
        """Wait for a whole answer. Raises ClientError."""
        gather = convert.Gather()
        async with self.generate(
            prompt,
            sampling,
            request_id=request_id,
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
            idempotency_key=idempotency_key,
            timeout_s=timeout_s,
        ) as stream:
            async for event in stream:
                gather.add(event)
        return gather.completion()

    async def tokenize(self, prompt: str | Sequence[ChatMessage], *, timeout_s: float | None = None) -> tuple[int, ...]:
        """The token ids that `generate` would compute for the prompt. Raises ClientError."""
        request = convert.to_tokenize(prompt)
        response: pb.TokenizeResponse = await _mapped_await(
            self._stub.Tokenize(request, timeout=timeout_or(timeout_s, self._call_timeout_s))
        )
        return tuple(response.token_ids)

    async def model(self, *, timeout_s: float | None = None) -> Model:
        """What is served. Raises ClientError."""
        response: pb.Model = await _mapped_await(
            self._stub.GetModel(pb.GetModelRequest(), timeout=timeout_or(timeout_s, self._call_timeout_s))
        )
        return convert.from_model(response)

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether a request could be served now. Raises ClientError where nobody answers."""
        health: Health = await _mapped_await(
            self._health(INFERENCE, timeout=timeout_or(timeout_s, self._call_timeout_s))
        )
        return health

    async def close(self) -> None:
        """Cancel what runs and close the channel. Idempotent."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
