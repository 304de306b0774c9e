"""When a message that has begun is late: its time grows with its length."""

from __future__ import annotations

from anabranch.system.clock import awake_s

STALL_TIMEOUT_S = 10.0
MIN_BYTES_PER_S = 1 << 20


def message_deadline(num_bytes: int) -> float:
    """When a message of `num_bytes` that begins now is late, on `awake_s`."""
    return awake_s() + STALL_TIMEOUT_S + num_bytes / MIN_BYTES_PER_S
