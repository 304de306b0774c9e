"""The control channel: small typed messages between the orchestrator and workers (ZeroMQ, MessagePack).

    server = ControlServer("tcp://127.0.0.1:*", ToOrchestrator)    # ROUTER; server.endpoint has the real port
    peer, message = await server.recv()                            # never raises for what a peer sent
    await server.send(peer, message)                               # PeerLost, Overloaded, FrameTooLarge
    server.close()

    client = ControlClient(server.endpoint, ToWorker, identity=b"decode-0")    # DEALER
    await client.send(message)
    message = await client.recv()

The second argument is the union of messages that may arrive; the other direction's may be sent.
`num_malformed` counts what arrived and was not such a message. Beyond loopback and ipc a server binds only
with `allow_remote=True` (ConfigError).
"""

from transport.control.client import ControlClient
from transport.control.server import ControlServer

__all__ = ["ControlClient", "ControlServer"]
