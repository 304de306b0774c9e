"""Raw connections to a control channel, for tests that say what no client of ours would."""

from __future__ import annotations

import asyncio

from transport.control.handshake import introduce

SECRET = b"the secret of the tests' channel"


async def dial(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has said nothing yet."""
    if endpoint.startswith("ipc://"):
        return await asyncio.open_unix_connection(endpoint.removeprefix("ipc://"))
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))


async def proven(
    endpoint: str, secret: bytes = SECRET, name: str = "raw"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has proved to know the secret and may send frames."""
    reader, writer = await dial(endpoint)
    await introduce(reader, writer, secret, name)
    return reader, writer
