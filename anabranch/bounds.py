"""Types of what comes from another process: bounded, so that decoding refuses what no honest process would say.

What has passed can be added up, shown to operators and put into any field of the gRPC messages (int64). The bounds
are wide: they tell sense from nonsense. What a request may ask for is `SamplingParams.validate`, what a worker can
hold its own check.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

# A control message has at most as many bytes, so no list of it has more entries.
MAX_ENTRIES = 8 << 20
MAX_ERROR_CHARS = 2000
MAX_SALT_CHARS = 256

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
"""Tokens, blocks, bytes, requests, epochs; a thousand of them still fit int64."""

Extent: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""A size of a model or mesh, a rank, a token or block id, a process id."""

Int63: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""What was drawn at random, or is as large as a client likes."""

Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A span of time; never NaN."""

Name: TypeAlias = Annotated[str, Meta(max_length=128)]
"""Of a worker, request, plane, dtype, device, error or model family."""

Place: TypeAlias = Annotated[str, Meta(max_length=4096)]
"""A path or an address."""

Salt: TypeAlias = Annotated[str, Meta(max_length=MAX_SALT_CHARS)]

ErrorText: TypeAlias = Annotated[str, Meta(max_length=MAX_ERROR_CHARS)]

ExtentList: TypeAlias = Annotated[tuple[Extent, ...], Meta(max_length=MAX_ENTRIES)]
"""Token ids of a prompt, block ids of a table."""
