"""The control channel: small typed messages between the orchestrator and workers, MessagePack frames on a stream.

    server = ControlServer("tcp://127.0.0.1:0", ToOrchestrator, secret=secret)    # server.endpoint has the real port
    await server.start()
    peer, message = await server.recv()                            # never raises for what a peer sent
    await server.send(peer, message)                               # PeerLost, Overloaded, FrameTooLarge
    await server.close()

    client = ControlClient(server.endpoint, ToWorker, secret=secret)
    await client.send(message)
    message = await client.recv()
    await client.close()

The second argument is the union of messages that may arrive; the other direction's may be sent. Before the first
message both ends prove that they know the secret (`handshake`). `num_malformed` counts what arrived and was no
message, `num_refused` the connections that proved nothing. TCP needs a secret, and beyond loopback a server binds
only with `allow_remote=True` (ConfigError).
"""

from transport.control.client import ControlClient
from transport.control.server import ControlServer

__all__ = ["ControlClient", "ControlServer"]
