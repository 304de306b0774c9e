"""What the clients share: channel options, deadlines, paths that need no generated stub, health's tiny messages."""

from __future__ import annotations

from anabranch_client.errors import InvalidRequest
from anabranch_client.types import Health

INFERENCE = "anabranch.v1.Inference"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

KEEPALIVE_S = 10.0


def channel_options(keepalive_s: float = KEEPALIVE_S) -> tuple[tuple[str, int], ...]:
    """gRPC's channel arguments.

    Args:
        keepalive_s: silence during a call after which the server is asked for a sign of life, and the wait for it.
    """
    keepalive_ms = max(1, round(1000 * keepalive_s))
    return (
        # Endpoints are named outright, so an HTTP proxy from the environment must not get between.
        ("grpc.enable_http_proxy", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
        # A long prompt is computed in silence: ask as often as it takes.
        ("grpc.http2.max_pings_without_data", 0),
    )


MAX_TIMEOUT_S = 86400.0
MAX_ENDPOINT_CHARS = 1024

_HEALTH_BY_NUMBER: dict[int, Health] = {1: "serving", 2: "not_serving"}


def timeout_of(name: str, value: float) -> float:
    """A deadline in seconds as a caller gave it. Raises InvalidRequest for what is no length of time to wait."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"{name}: must be above 0 and at most {MAX_TIMEOUT_S:.0f} seconds", code="invalid_request")
    return value


def timeout_or(value: float | None, default_s: float) -> float:
    """A call's own deadline where it gave one, else the client's. Raises InvalidRequest."""
    return default_s if value is None else timeout_of("timeout_s", value)


def endpoint_of(endpoint: str) -> str:
    """An endpoint that gRPC can be given. Raises InvalidRequest."""
    if not endpoint or len(endpoint) > MAX_ENDPOINT_CHARS or not endpoint.isprintable():
        raise InvalidRequest(
            f"endpoint: {endpoint[:80]!r}: give host:port, or unix:path, in at most {MAX_ENDPOINT_CHARS} characters",
            code="invalid_request",
        )
    return endpoint


def health_request(service: str) -> bytes:
    """`grpc.health.v1.HealthCheckRequest`: one string field; spelt here, so that the SDK needs no package for it."""
    name = service.encode()
    assert len(name) < 128
    return bytes((0x0A, len(name))) + name if name else b""


def health_response(data: bytes) -> Health:
    """`grpc.health.v1.HealthCheckResponse`: one enum field."""
    return _HEALTH_BY_NUMBER.get(data[1], "unknown") if len(data) == 2 and data[0] == 0x08 else "unknown"
