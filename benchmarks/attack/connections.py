"""Clients that stop: calls whose answer is never read (an HTTP/2 window of 0), and connections that say nothing."""

from __future__ import annotations

import asyncio
import socket
import time

from anabranch_client.v1 import anabranch_pb2 as pb
from benchmarks.attack.http2 import Http2Client, connect
from benchmarks.attack.tally import Tally

GENERATE = "/anabranch.v1.Inference/Generate"
STREAMS_PER_CONNECTION = 5
# Above client_stall_s and handshake_timeout_s of the orchestrator, which end both.
END_TIMEOUT_S = 30.0


class Stalled:
    """Opened before the other attacks, which they last into: the orchestrator must end them by itself.

    Args:
        control_path: the control channel's Unix socket.
        number: of connections of each kind.
    """

    def __init__(self, endpoint: str, control_path: str, number: int) -> None:
        self._readers: list[tuple[Http2Client, list[int]]] = []
        self._silent: list[socket.socket] = []
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]))
        request.sampling.ignore_eos = True
        body = request.SerializeToString()
        for _ in range(number):
            client = Http2Client(endpoint)
            self._readers.append((client, [client.call(GENERATE, body) for _ in range(STREAMS_PER_CONNECTION)]))
            # A call whose message never comes.
            self._readers[-1][1].append(client.call(GENERATE, None))
            self._silent += [connect(endpoint), connect(f"unix:{control_path}")]

    async def watch(self, tally: Tally) -> None:
        """Wait for all ends, and count those that do not come as `open`; counted as `connections`."""
        await asyncio.to_thread(self._watch, tally)

    def _watch(self, tally: Tally) -> None:
        for client, stream_ids in self._readers:
            closed = _closes(client, stream_ids)
            ended = sum(client.ended(stream_id) for stream_id in stream_ids)
            tally.count("connections", "stalled.reset", ended)
            left = len(stream_ids) - ended
            if left:
                tally.count("connections", "stalled.closed" if closed else "stalled.open", left)
        for sock in self._silent:
            tally.count("connections", "silent.closed" if _closed(sock) else "silent.open")

    def close(self) -> None:
        for client, _ in self._readers:
            client.close()
        for sock in self._silent:
            sock.close()


def _closes(client: Http2Client, stream_ids: list[int]) -> bool:
    """Take in what comes until all streams have ended; whether the connection ends before."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while not all(client.ended(stream_id) for stream_id in stream_ids) and time.monotonic() < deadline:
        try:
            if not client.receive(deadline - time.monotonic()):
                return True
        except OSError:  # it is closed while an answer to its ping is on the way
            return True
    return False


def _closed(sock: socket.socket) -> bool:
    """Whether the other end has hung up, or does so in time."""
    sock.settimeout(END_TIMEOUT_S)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
