"""Raw connections to a control channel, for what no worker of ours would say."""

from __future__ import annotations

import asyncio

from transport.control.endpoint import parse_endpoint
from transport.control.handshake import introduce


async def dial(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has said nothing yet."""
    address = parse_endpoint("endpoint", endpoint)
    if not address.is_tcp:
        return await asyncio.open_unix_connection(address.path)
    return await asyncio.open_connection(address.host, address.port)


async def proven(endpoint: str, secret: bytes, name: str = "raw") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has proved to know the secret and may send frames."""
    reader, writer = await dial(endpoint)
    await introduce(reader, writer, secret, name)
    return reader, writer
