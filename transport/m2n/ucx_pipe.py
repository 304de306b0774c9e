"""A link over UCX, progressed where its end is called, without a thread.

A message is one tagged message, its header and body in one buffer. There is a buffer for each message that may be out,
made when the link begins, and receives are asked for ahead into all that are free; so what comes has a place, and what
no honest peer sends has none.

UCX does not notice within a host that a process has ended. The socket that joined the two ends does.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from anabranch.errors import MalformedMessage, PeerLost
from transport.m2n.body import body_of, checksum_of
from transport.m2n.ends import Terms
from transport.m2n.header import HEADER_BYTES
from transport.m2n.pipe import Message, Packer, Region
from transport.m2n.waiter import Waiter
from transport.ucx.api import UcxRequest, UcxWorker, load
from transport.ucx.endpoint import close_endpoint, open_endpoint

_TAG = 3  # beside the tensor plane's


class UcxWay:
    """A UCX worker with an endpoint to the peer's.

    Raises:
        TransportUnavailable: UCX finds no way to the peer.
    """

    def __init__(self, worker: UcxWorker, peer_address: bytes, peer: str) -> None:
        self.worker = worker
        self.endpoint = open_endpoint(worker, peer_address, peer)
        self.tag = load().UCXXTag(_TAG)
        self._peer = peer

    def close(self, requests: Sequence[UcxRequest]) -> None:
        """Close it; UCX lets go of these requests."""
        close_endpoint(self.endpoint, self.worker, requests, (self.tag,), self._peer)


class _Outgoing:
    """A buffer for a message to be sent.

    Attributes:
        array: of the first `num_bytes`, as UCX takes it; kept, for the next message is mostly as long.
        request: of the last message; None: it has been sent.
    """

    __slots__ = ("array", "memory", "num_bytes", "request")

    def __init__(self, num_bytes: int) -> None:
        self.memory = np.zeros(num_bytes, np.uint8).data
        self.num_bytes = 0
        self.array: object = None
        self.request: UcxRequest | None = None


class UcxPipe:
    """See `Pipe`.

    Args:
        sock: connected, non-blocking; the pipe's from now on, like `way`.
    """

    def __init__(self, sock: socket.socket, way: UcxWay, terms: Terms, waiter: Waiter) -> None:
        self._core = load()
        self._sock = sock
        self._way: UcxWay | None = way
        self._fd = way.worker.epoll_file_descriptor
        self._peer = terms.peer
        self._waiter = waiter
        self._opener = terms.opener()
        self._lost = ""
        # Zeros, whose pages come with use: a peer that sends less than it announces shows nothing of this process.
        buffers = [np.zeros(terms.in_bytes, np.uint8) for _ in range(terms.num_in)]
        self._in = [Region(buffer.data) for buffer in buffers]
        self._in_arrays = [self._core.Array(buffer) for buffer in buffers]
        self._asked: deque[tuple[UcxRequest, int]] = deque()
        # The last one is for a message that is sent before UCX has said that its predecessor has gone.
        self._free_out = [_Outgoing(terms.out_bytes) for _ in range(terms.num_out + 1)]
        self._sent: deque[_Outgoing] = deque()
        for slot in range(terms.num_in):
            self._ask(slot)
        waiter.watch(sock.fileno(), select.EPOLLIN, self._handle)
        waiter.watch(self._fd, select.EPOLLIN, lambda events: self.progress())
        waiter.add_progress(self)

    def _ask(self, slot: int) -> None:
        assert self._way is not None
        try:
            request = self._way.endpoint.tag_recv(self._in_arrays[slot], self._way.tag)
        except self._core.UCXError as error:
            self._lose(str(error))
        else:
            self._asked.append((request, slot))

    def send(self, slot: int, pack: Packer, parts: Sequence[torch.Tensor]) -> None:
        if self._lost or self._way is None:
            raise PeerLost(self._lost)
        out = self._next_out()
        memory, end = out.memory, HEADER_BYTES
        for part in body_of(parts):
            start, end = end, end + part.nbytes
            memory[start:end] = part
        memory[:HEADER_BYTES] = pack(checksum_of([memory[HEADER_BYTES:end]]) if end > HEADER_BYTES else 0)
        if out.num_bytes != end:
            out.num_bytes, out.array = end, self._core.Array(memory[:end])
        try:
            out.request = self._way.endpoint.tag_send(out.array, self._way.tag)
        except self._core.UCXError as error:
            raise self._lose(str(error)) from error
        self._sent.append(out)

    def _next_out(self) -> _Outgoing:
        """A buffer whose last message has gone."""
        self._collect_sent()
        if not self._free_out:
            self.progress()
            self._collect_sent()
        if not self._free_out:
            raise self._lose("it asks for more than it takes")
        return self._free_out.pop()

    def _collect_sent(self) -> None:
        sent = self._sent
        while sent and (request := sent[0].request) is not None and request.completed:
            self._check(request)
            sent[0].request = None
            self._free_out.append(sent.popleft())

    def _check(self, request: UcxRequest) -> None:
        """Raises PeerLost, MalformedMessage where a transfer has failed."""
        try:
            request.check_error()
        except self._core.UCXMessageTruncatedError as error:
            raise MalformedMessage(f"{self._peer}: body_bytes: a message longer than its slot") from error
        except self._core.UCXError as error:
            raise self._lose(str(error)) from error

    def progress(self) -> bool:
        """Let UCX go on; whether there may be something to take."""
        if self._lost or self._way is None:
            return bool(self._lost)
        try:
            self._way.worker.progress()
        except self._core.UCXError as error:
            self._lose(str(error))
            return True
        return self._has_come()

    def _has_come(self) -> bool:
        return bool(self._asked) and self._asked[0][0].completed

    def arm(self) -> bool:
        """Have UCX's descriptor call when something happens; False where something has happened already."""
        if self._lost or self._way is None:
            return False
        try:
            return self._way.worker.arm()
        except self._core.UCXError as error:
            self._lose(str(error))
            return False

    def take(self) -> Message | None:
        if self._way is None:
            raise PeerLost(self._lost)
        if not self._has_come() and not self.progress():
            self._refuse_excess()
            return None
        if not self._has_come():
            # What it sent before it ended is there by now, or never will be.
            self._way.worker.progress()
            if not self._has_come():
                raise PeerLost(self._lost)
        request, slot = self._asked.popleft()
        self._check(request)
        region = self._in[slot]
        header = self._opener(bytes(region.memory[:HEADER_BYTES]))
        return Message(slot, header, region, HEADER_BYTES)

    def _refuse_excess(self) -> None:
        """Raises MalformedMessage where a message has come that has no place: UCX would keep as many as are sent."""
        if not self._asked and self._way is not None and self._way.worker.tag_probe(self._way.tag).matched:
            raise MalformedMessage(f"{self._peer}: slots: it sends more calls than its link may have out")

    def give_back(self, slot: int) -> None:
        if not self._lost:
            self._ask(slot)

    def close(self) -> None:
        way, self._way = self._way, None
        if way is None:
            return
        self._lose("closed at this end")
        self._waiter.forget(self._fd)
        requests = [request for request, _ in self._asked]
        requests += [out.request for out in self._sent if out.request is not None]
        way.close(requests)
        self._asked.clear()
        self._sent.clear()
        self._in_arrays.clear()
        self._free_out.clear()
        self._sock.close()

    def _handle(self, events: int) -> bool:
        """The socket has something: only its end is right."""
        try:
            if self._sock.recv(1):
                self._lose("it speaks on the socket that only shows that it lives")
            else:
                self._lose("it closed the link")
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(str(error))
        return True

    def _lose(self, reason: str) -> PeerLost:
        if not self._lost:
            self._lost = f"{self._peer}: {reason}"
            self._waiter.forget(self._sock.fileno())
            self._waiter.remove_progress(self)
        return PeerLost(self._lost)
