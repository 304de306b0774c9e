"""A link over a socket: progressed where its end is called, without a thread.

What the kernel does not take at once is copied to a buffer of the link's own and follows later. There are as many
buffers as calls may be out, so a peer that reads nothing cannot make them grow.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from anabranch.errors import MalformedMessage, PeerLost
from transport.m2n.body import body_of, checksum_of
from transport.m2n.ends import Terms
from transport.m2n.header import HEADER_BYTES, Header
from transport.m2n.pipe import Message, Packer, Region
from transport.m2n.waiter import Waiter

SOCKET_BUFFER_BYTES = 4 << 20
READ_AHEAD_BYTES = 32 << 10
"""A message up to here comes with one system call."""
# A peer whose host is gone without a word: its link ends within half a minute.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class TcpPipe:
    """See `Pipe`.

    Args:
        sock: connected, non-blocking; the pipe's from now on.
    """

    def __init__(self, sock: socket.socket, terms: Terms, waiter: Waiter) -> None:
        self._sock = sock
        self._peer = terms.peer
        self._waiter = waiter
        self._opener = terms.opener()
        self._lost = ""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        # Their pages come with use.
        self._in = [Region(np.empty(terms.in_bytes, np.uint8).data) for _ in range(terms.num_in)]
        self._out = [np.empty(terms.out_bytes, np.uint8).data for _ in range(terms.num_out)]
        self._free_in = list(range(terms.num_in))
        self._free_out = list(range(terms.num_out))
        self._unsent: deque[tuple[int, memoryview]] = deque()
        self._ahead = memoryview(bytearray(READ_AHEAD_BYTES))
        self._from, self._to = 0, 0
        # The last read took all there was: the next one is left to who has waited.
        self._drained = False
        # The message whose body is on its way.
        self._header: Header | None = None
        self._slot = 0
        self._num_read = 0
        self._hasher: xxhash.xxh3_64 | None = None
        waiter.watch(sock.fileno(), select.EPOLLIN, self._handle)

    def send(self, slot: int, pack: Packer, parts: Sequence[torch.Tensor]) -> None:
        if self._lost:
            raise PeerLost(self._lost)
        body = body_of(parts)
        message = [memoryview(pack(checksum_of(body) if body else 0)), *body]
        num_sent = 0
        if not self._unsent:
            try:
                num_sent = self._sock.sendmsg(message)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lose(str(error)) from error
        if num_sent < sum(part.nbytes for part in message):
            self._keep(message, num_sent)

    def _keep(self, message: Sequence[memoryview], num_sent: int) -> None:
        """Copy what follows the first `num_sent` bytes, to be sent later."""
        if not self._free_out:
            raise self._lose("it asks for more than it takes")
        index = self._free_out.pop()
        end = 0
        for part in message:
            rest = part[num_sent:]
            num_sent -= part.nbytes - rest.nbytes
            self._out[index][end : end + rest.nbytes] = rest
            end += rest.nbytes
        self._unsent.append((index, self._out[index][:end]))
        if len(self._unsent) == 1:
            self._waiter.change(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _flush(self) -> None:
        try:
            while self._unsent:
                index, rest = self._unsent[0]
                rest = rest[self._sock.send(rest) :]
                if rest.nbytes:
                    self._unsent[0] = (index, rest)
                    continue
                self._unsent.popleft()
                self._free_out.append(index)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))
            return
        self._waiter.change(self._sock.fileno(), select.EPOLLIN)

    def take(self) -> Message | None:
        if self._lost:
            raise PeerLost(self._lost)
        if self._header is None:
            if self._to - self._from < HEADER_BYTES and not self._read_ahead():
                return None
            self._begin(self._opener(bytes(self._ahead[self._from : self._from + HEADER_BYTES])))
        if not self._read_body():
            return None
        header, self._header = self._header, None
        assert header is not None
        checksum = None if self._hasher is None else self._hasher.intdigest() or 1
        return Message(self._slot, header, self._in[self._slot], 0, checksum)

    def _read_body(self) -> bool:
        """Read what there is of the body of the message in hand; whether it is whole."""
        header, memory = self._header, self._in[self._slot].memory
        assert header is not None
        while self._num_read < header.body_bytes:
            piece = memory[self._num_read : header.body_bytes]
            num_bytes = self._receive(piece)
            if not num_bytes:
                return False
            start, self._num_read = self._num_read, self._num_read + num_bytes
            # What comes in pieces is summed while the next one is on its way.
            if self._hasher is None and self._num_read < header.body_bytes:
                self._hasher, start = xxhash.xxh3_64(), 0
            if self._hasher is not None:
                self._hasher.update(memory[start : self._num_read])
        return True

    def _begin(self, header: Header) -> None:
        """Find a buffer for a message, and copy what is there of its body."""
        if not self._free_in:
            raise MalformedMessage(f"{self._peer}: slots: it sends more calls than its link may have out")
        self._header, self._slot, self._hasher = header, self._free_in.pop(), None
        start = self._from + HEADER_BYTES
        end = min(self._to, start + header.body_bytes)
        self._num_read = end - start
        self._in[self._slot].memory[: self._num_read] = self._ahead[start:end]
        self._from = end

    def _read_ahead(self) -> bool:
        """Read what there is, up to some bytes; whether there is a header."""
        if self._drained:
            self._drained = False
            return False
        rest = bytes(self._ahead[self._from : self._to])
        self._from, self._to = 0, len(rest)
        self._ahead[: self._to] = rest
        num_bytes = self._receive(self._ahead[self._to :])
        self._to += num_bytes
        self._drained = num_bytes > 0 and self._to < READ_AHEAD_BYTES
        return self._to >= HEADER_BYTES

    def _receive(self, target: memoryview) -> int:
        """Bytes read, 0 for none now."""
        try:
            num_bytes = self._sock.recv_into(target)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lose(str(error)) from error
        if not num_bytes:
            raise self._lose("it closed the link")
        return num_bytes

    def give_back(self, slot: int) -> None:
        self._free_in.append(slot)

    def close(self) -> None:
        self._lose("closed at this end")
        self._sock.close()

    def _handle(self, events: int) -> bool:
        self._drained = False
        if events & select.EPOLLOUT:
            self._flush()
        if self._lost:
            return True
        if self._header is None or not events & ~select.EPOLLOUT:
            return bool(events & ~select.EPOLLOUT)
        try:
            return self._read_body()  # a wait goes on until the message is whole
        except PeerLost:
            return True

    def _lose(self, reason: str) -> PeerLost:
        if not self._lost:
            self._lost = f"{self._peer}: {reason}"
            self._waiter.forget(self._sock.fileno())
        return PeerLost(self._lost)
