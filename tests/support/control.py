"""Raw connections to a control channel that know the tests' secret."""

from __future__ import annotations

import asyncio

from benchmarks.attack import channel
from benchmarks.attack.channel import dial

__all__ = ["SECRET", "dial", "proven"]

SECRET = b"the secret of the tests' channel"


async def proven(
    endpoint: str, secret: bytes = SECRET, name: str = "raw"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has proved to know the secret and may send frames."""
    return await channel.proven(endpoint, secret, name)
