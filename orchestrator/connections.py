"""What the gateway allows connections: how many, how long without a word, and how they show that they live."""

from __future__ import annotations

import logging
import resource
import socket

from anabranch.config.orchestrator import OrchestratorConfig

logger = logging.getLogger(__name__)

# For workers, files and pipes: a flood of clients' connections must not keep a worker from registering.
RESERVED_DESCRIPTORS = 256
# A client that waits for a long prompt may ask this often whether the server lives.
MIN_PING_INTERVAL_S = 5.0
# Beyond the most calls.
SPARE_STREAMS = 1024


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may; for the start of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections(configured: int) -> int:
    """The most connections of clients at a time: what is configured, or what descriptors allow; then it says so."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return configured
    allowed = max(limit // 2, limit - RESERVED_DESCRIPTORS)
    if allowed < configured:
        logger.warning(
            "max_connections: %d, not %d: this process may have %d descriptors (raise `ulimit -Hn`)",
            allowed,
            configured,
            limit,
        )
    return min(configured, allowed)


def server_options(config: OrchestratorConfig) -> list[tuple[str, int]]:
    """gRPC's channel arguments for the server."""
    # gRPC counts the connections of each address that a name stands for.
    connections = max_connections(config.max_connections) // _num_addresses(config.grpc_bind)
    return [
        # Otherwise a second process could take the same port and half of the clients in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_request_bytes),
        # A client's gRPC lets calls beyond this wait in silence: there are always more than `max_calls` lets in, so
        # that the rest is refused by name. These are the refusals of one connection that may be under way.
        ("grpc.max_concurrent_streams", config.max_calls + SPARE_STREAMS),
        ("grpc.max_allowed_incoming_connections", max(1, connections)),
        # From the connection to the client's SETTINGS.
        ("grpc.server_handshake_timeout_ms", _ms(config.handshake_timeout_s)),
        ("grpc.max_connection_idle_ms", _ms(config.connection_idle_s)),
        ("grpc.keepalive_time_ms", _ms(config.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(config.keepalive_timeout_s)),
        ("grpc.http2.ping_timeout_ms", _ms(config.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(MIN_PING_INTERVAL_S)),
    ]


def _ms(seconds: float) -> int:
    return max(1, round(1000 * seconds))


def _num_addresses(bind: str) -> int:
    if bind.startswith("unix:"):
        return 1
    host = bind.rpartition(":")[0].strip("[]")
    try:
        return len({found[4][0] for found in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)})
    except OSError:  # binding tells
        return 1
