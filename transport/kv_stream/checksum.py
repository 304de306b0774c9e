"""The checksum of a slice's payload."""

from __future__ import annotations

import xxhash


def checksum(data: memoryview) -> int:
    """xxh3-64 of contiguous bytes."""
    return int(xxhash.xxh3_64_intdigest(data))
