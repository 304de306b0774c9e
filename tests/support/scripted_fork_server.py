"""`python -m tests.support.scripted_fork_server [FD]`: a fork server whose encoders do what the text says.

With FD it is the server. Without, it is what an orchestrator is: it forks a server, and an encoder hangs in a chat.

`hang` computes for ever, `hang-native` inside one call that holds the GIL, `grow` takes memory without end, `die`
ends the process; `wait PATH` waits until the path exists; anything else is encoded as its bytes. Chats do what their
first content says.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import InvalidRequest
from orchestrator.encoding.fork_server import ForkServer
from orchestrator.encoding.messages import Encoded, EncodeText, Failed, FromEncoder, Rendered, ToEncoder
from orchestrator.encoding.pool import EncoderPool
from orchestrator.encoding.process import serve_forks, start_fork_server

MEMORY_BYTES = 256 << 20
MAX_REQUEST_BYTES = 8 << 20


def encode(request: ToEncoder) -> Iterator[FromEncoder]:
    text = request.text if isinstance(request, EncodeText) else request.messages[0][1]
    if text.startswith("rendered:"):
        yield Rendered()
        text = text.removeprefix("rendered:")
    if text == "hang":
        while True:
            pass
    elif text == "hang-native":
        10**10**9
    elif text == "grow":
        kept = []
        while True:
            kept.append(bytearray(1 << 20))
    elif text == "die":
        os._exit(7)
    elif text == "refuse":
        yield Failed(code=InvalidRequest.code, message="text: refused")
    elif text.startswith("wait "):
        while not Path(text.removeprefix("wait ")).exists():
            time.sleep(0.001)
        yield Encoded(ids=[1])
    else:
        yield Encoded(ids=list(text.encode()))


async def hang(pid: int, control: socket.socket) -> None:
    pool = EncoderPool(OrchestratorConfig(model="bytes"), ForkServer(pid, control))
    await pool.start()
    await pool.encode([("user", "hang")])


if __name__ == "__main__":
    limits = {"memory_bytes": MEMORY_BYTES, "max_request_bytes": MAX_REQUEST_BYTES}
    if sys.argv[1:]:
        serve_forks(socket.socket(fileno=int(sys.argv[1])), encode, **limits)
    else:
        asyncio.run(hang(*start_fork_server(encode, **limits)))
