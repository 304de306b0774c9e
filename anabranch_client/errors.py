"""Every error that the client raises, as one tree; gRPC's own never leave the SDK.

    ClientError
    +-- InvalidRequest (ValueError)     a field that the caller can mend; the message starts with its name
    |   +-- ContextExceeded             prompt plus answer longer than the context
    +-- CallFailed                      the call did not end well
        +-- Overloaded                  the queue is full; later there may be room
        +-- DeadlineExceeded            the call's own deadline, or a named wait at the server, ran out
        +-- CallCancelled
        +-- AccessDenied                the call needs a secret, such as Admin's token, and did not show it
        +-- Unavailable                 nobody listens there, no worker can serve, or KV was lost on its way
        |   +-- WorkerDied              the process that held the request ended
        |   +-- FfnUnavailable          no FFN worker answered for a layer or an expert in time
        |   +-- NoWorkers               no worker of a role that is needed takes requests
        |   +-- Draining                the server takes no new work
        +-- ServerFailed                anything else

Each has `code`, the server's stable word for what went wrong (trailing metadata `anabranch-code`), or gRPC's
status in lower case where the server said nothing; `unresponsive` where it stopped giving signs of life.
"""

from __future__ import annotations

import grpc

CODE_KEY = "anabranch-code"
RETRY_AFTER_KEY = "anabranch-retry-after-s"
MAX_RETRY_AFTER_S = 3600.0


class ClientError(Exception):
    """Base of the tree.

    Attributes:
        code: stable snake-case word.
        message: for people.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class InvalidRequest(ClientError, ValueError):
    """A field of the request is wrong."""


class ContextExceeded(InvalidRequest):
    """Prompt plus answer are longer than the context."""


class CallFailed(ClientError):
    """The call did not end well."""


class Overloaded(CallFailed):
    """The server has no room now.

    Attributes:
        retry_after_s: when to try again, by what the server measured; None where it did not say.
    """

    retry_after_s: float | None = None


class DeadlineExceeded(CallFailed):
    """The call's deadline, or a named wait at the server, ran out."""


class CallCancelled(CallFailed):
    """The call was cancelled."""


class AccessDenied(CallFailed):
    """The call needs a secret that it did not show."""


class Unavailable(CallFailed):
    """Nobody listens there, no worker can serve, or a request's KV was lost on its way: again may do."""


class WorkerDied(Unavailable):
    """The process that held the request ended."""


class FfnUnavailable(Unavailable):
    """No FFN worker answered for a layer or an expert in time; the message names them."""


class NoWorkers(Unavailable):
    """No worker of a role that is needed takes requests; the message says which."""


class Draining(Unavailable):
    """The server takes no new work."""


class ServerFailed(CallFailed):
    """The server failed in a way that a client cannot mend."""


_BY_CODE: dict[str, type[ClientError]] = {
    "context_exceeded": ContextExceeded,
    "worker_died": WorkerDied,
    "ffn_unavailable": FfnUnavailable,
    "no_workers": NoWorkers,
    "draining": Draining,
}

_BY_STATUS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: CallCancelled,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


# How gRPC says that somebody took the connection, and then gave no sign of life.
_SILENCE = ("ping timeout", "keepalive watchdog", "timed out before receiving SETTINGS")


def error_of(
    status: grpc.StatusCode, details: str | None, code: str | None, retry_after_s: float | None = None
) -> ClientError:
    """The error for a gRPC status, its message, and the server's code and retry time where it gave them."""
    if code is None and status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (details or ""):
        return InvalidRequest(details or "", code="message_too_large")
    if code is None and status is grpc.StatusCode.UNAVAILABLE and any(word in (details or "") for word in _SILENCE):
        return Unavailable(f"the server gives no sign of life ({details})", code="unresponsive")
    kind = _BY_CODE.get(code or "") or _BY_STATUS.get(status, ServerFailed)
    error = kind(details or status.name.lower(), code=code or status.name.lower())
    if isinstance(error, Overloaded):
        error.retry_after_s = retry_after_s
    return error


def code_of(trailers: object) -> str | None:
    """The value of `anabranch-code` in trailing metadata, as either gRPC flavour gives it."""
    return _trailer(trailers, CODE_KEY)


def retry_after_of(trailers: object) -> float | None:
    """The value of `anabranch-retry-after-s` in trailing metadata, in seconds; None for what is no time to wait."""
    try:
        value = float(_trailer(trailers, RETRY_AFTER_KEY) or "")
    except ValueError:
        return None
    return value if 0.0 <= value <= MAX_RETRY_AFTER_S else None


def _trailer(trailers: object, wanted: str) -> str | None:
    if trailers is None:
        return None
    assert hasattr(trailers, "__iter__")
    for key, value in trailers:
        if key == wanted:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return None
