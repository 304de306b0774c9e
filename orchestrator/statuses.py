"""Which gRPC status each of our errors is."""

from __future__ import annotations

import grpc

from anabranch.errors import (
    AccessDenied,
    AnabranchError,
    CapacityError,
    ChatTemplateError,
    ConfigError,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NoWorkers,
    PeerLost,
    RequestCancelled,
    TransportUnavailable,
    UnknownModel,
    WorkerDied,
)

CODE_KEY = "anabranch-code"

_STATUSES: tuple[tuple[type[AnabranchError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    # Not the client's fault, and trying again does not help until the model's files are mended.
    (ChatTemplateError, grpc.StatusCode.FAILED_PRECONDITION),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestCancelled, grpc.StatusCode.CANCELLED),
    (WorkerDied, grpc.StatusCode.UNAVAILABLE),
    (NoWorkers, grpc.StatusCode.UNAVAILABLE),
    (Draining, grpc.StatusCode.UNAVAILABLE),
    (PeerLost, grpc.StatusCode.UNAVAILABLE),
    (TransportUnavailable, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: AnabranchError) -> grpc.StatusCode:
    """The status that a client sees; INTERNAL for what has none of its own."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def trailers_of(error: AnabranchError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that names the error."""
    return ((CODE_KEY, error.code),)
