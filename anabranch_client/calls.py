"""What the two clients share: channel options, call paths that need no generated stub, health's tiny messages."""

from __future__ import annotations

from anabranch_client.types import Health

INFERENCE = "anabranch.v1.Inference"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# Endpoints are named outright, so an HTTP proxy from the environment must not get between.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.enable_http_proxy", 0),)

_HEALTH_BY_NUMBER: dict[int, Health] = {1: "serving", 2: "not_serving"}


def health_request(service: str) -> bytes:
    """`grpc.health.v1.HealthCheckRequest`: one string field; spelt here, so that the SDK needs no package for it."""
    name = service.encode()
    assert len(name) < 128
    return bytes((0x0A, len(name))) + name if name else b""


def health_response(data: bytes) -> Health:
    """`grpc.health.v1.HealthCheckResponse`: one enum field."""
    return _HEALTH_BY_NUMBER.get(data[1], "unknown") if len(data) == 2 and data[0] == 0x08 else "unknown"
