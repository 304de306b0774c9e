"""The synchronous client; safe to share between threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import grpc

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
from anabranch_client.errors import ClientError, code_of, error_of, retry_after_of
from anabranch_client.types import ChatMessage, Completion, Event, Health, Model, Prompt, Sampling
from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def mapped(error: grpc.RpcError) -> ClientError:
    """The SDK's error for gRPC's."""
    assert isinstance(error, grpc.Call)
    trailers = error.trailing_metadata()
    return error_of(error.code(), error.details(), code_of(trailers), retry_after_of(trailers))


def call(
    method: Callable[..., _Response],
    request: object,
    timeout_s: float,
    metadata: Sequence[tuple[str, str]] | None = None,
) -> _Response:
    """One unary call. Raises ClientError."""
    try:
        return method(request, timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        raise mapped(error) from None


class Stream(Iterator[Event]):
    """One answer's events: Accepted, Tokens..., Finished. Closing or dropping it before the end cancels the call.

    Raises (from iteration): ClientError.
    """

    def __init__(self, events: grpc.CallIterator[pb.GenerateEvent]) -> None:
        self._call = events
        self._events = iter(events)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        try:
            return convert.from_event(next(self._events))
        except grpc.RpcError as error:
            raise mapped(error) from None

    def close(self) -> None:
        """Cancel the call, unless it has ended. Idempotent."""
        self._call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A client of one Anabranch endpoint.

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
            self._channel = grpc.insecure_channel(self.endpoint, options=options)
        else:
            self._channel = grpc.secure_channel(self.endpoint, credentials, options=options)
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
    ) -> Stream:
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
        return Stream(self._stub.Generate(request, timeout=timeout_or(timeout_s, self._timeout_s)))

    def complete(
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
        with self.generate(
            prompt,
            sampling,
            request_id=request_id,
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
            idempotency_key=idempotency_key,
            timeout_s=timeout_s,
        ) as stream:
            for event in stream:
                gather.add(event)
        return gather.completion()

    def tokenize(self, prompt: str | Sequence[ChatMessage], *, timeout_s: float | None = None) -> tuple[int, ...]:
        """The token ids that `generate` would compute for the prompt. Raises ClientError."""
        request = convert.to_tokenize(prompt)
        return tuple(call(self._stub.Tokenize, request, timeout_or(timeout_s, self._call_timeout_s)).token_ids)

    def model(self, *, timeout_s: float | None = None) -> Model:
        """What is served. Raises ClientError."""
        return convert.from_model(
            call(self._stub.GetModel, pb.GetModelRequest(), timeout_or(timeout_s, self._call_timeout_s))
        )

    def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether a request could be served now. Raises ClientError where nobody answers."""
        return call(self._health, INFERENCE, timeout_or(timeout_s, self._call_timeout_s))

    def close(self) -> None:
        """Cancel what runs and close the channel. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
