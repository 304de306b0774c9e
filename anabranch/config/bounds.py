"""Bounds of numbers and addresses in configurations, whether a file, a flag or Python gave them."""

from __future__ import annotations

import re

from anabranch.errors import ConfigError

MAX_COUNT = 2**31 - 1
MAX_SIZE_BYTES = 1 << 50
# By the last part of the key, where there is a smaller one than for all counts.
_MOST = {
    "threads": 4096,
    "encoders_per_lane": 64,
    "block_size": 4096,
    "max_step_tokens": 1 << 20,
    "max_running": 1 << 16,
    "cores": 1 << 16,
    # gRPC and ZeroMQ take these as 32-bit numbers.
    "max_request_bytes": MAX_COUNT,
    "max_control_bytes": MAX_COUNT,
}
_PORT = re.compile(r"[0-9]{1,5}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_count(key: str, value: int, least: int) -> None:
    """Refuse a number of things, or of bytes where the key says so, that is out of bounds. Raises ConfigError."""
    name = key.rpartition(".")[2]
    most = _MOST.get(name, MAX_SIZE_BYTES if name.endswith("_bytes") else MAX_COUNT)
    if value < least:
        raise ConfigError(key, value, f"must be at least {least}")
    if value > most:
        raise ConfigError(key, value, f"must be at most {most}")


def check_text(key: str, value: str, max_chars: int) -> None:
    """Refuse text that cannot be an argument of a process, or a line of its log. Raises ConfigError."""
    if len(value) > max_chars or _CONTROL.search(value):
        raise ConfigError(key, value, f"must have at most {max_chars} characters, and no control characters")


def is_port(text: str) -> bool:
    """Whether a text is a TCP port, 0 included."""
    return _PORT.fullmatch(text) is not None and int(text) <= 65535
