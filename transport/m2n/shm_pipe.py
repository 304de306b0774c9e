"""A link in shared memory: a segment without a name, and a Unix socket that tells that the other end lives.

The node makes the segment and passes its descriptor through the socket. Messages lie in its slots; a ring says in which
(see `native/m2n.h`). Bodies are looked at where they arrived, so a message is copied once. The mapping stays until the
last tensor over it is gone; the segment is the link's own, so no slot is ever used for another link.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.errors import MalformedMessage, PeerLost, TransportUnavailable
from transport.m2n.base import ChannelShape
from transport.m2n.build import load_brief_library, load_library
from transport.m2n.ends import Terms
from transport.m2n.header import HEADER_BYTES, max_answer_bytes, max_call_bytes
from transport.m2n.pipe import Message, Packer, Region
from transport.m2n.waiter import LOOK_S, Waiter

POPULATE_BYTES = 256 << 10
"""Of each slot: made present when the link begins, or the first long messages would wait for their pages."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MAX_PARTS = 4
BRIEF_BYTES = 64 << 10
"""Up to here a copy is too short for another thread to be let run meanwhile: to get the interpreter back from it may
take milliseconds."""
_EMPTY, _BROKEN = -1, -2
_WAKE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a segment, from the shape alone.

    Attributes:
        num_slots: of each direction: one more than calls may be out, for an answer is looked at where it lies.
        calls, answers: offsets of the slots.
        call_bytes, answer_bytes: of each slot.
    """

    num_slots: int
    calls: int
    call_bytes: int
    answers: int
    answer_bytes: int
    total: int


def layout_of(shape: ChannelShape) -> Layout:
    num_slots = shape.num_slots + 1
    calls = _pages(load_library().anabranch_m2n_control_bytes())
    call_bytes, answer_bytes = _pages(max_call_bytes(shape)), _pages(max_answer_bytes(shape))
    answers = calls + num_slots * call_bytes
    return Layout(num_slots, calls, call_bytes, answers, answer_bytes, answers + num_slots * answer_bytes)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def check_segment(fd: int, layout: Layout) -> None:
    """Raises MalformedMessage where the descriptor is no segment of this layout whose length is fixed."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    num_bytes = os.fstat(fd).st_size
    if num_bytes != layout.total or seals & _SEALS != _SEALS:
        raise MalformedMessage(f"segment: {num_bytes} bytes with seals {seals}, not {layout.total} with {_SEALS}")


class ShmPipe:
    """See `Pipe`.

    Args:
        sock: connected, non-blocking; the pipe's from now on.
        fd: the segment; may be closed afterwards.
    """

    def __init__(self, sock: socket.socket, fd: int, layout: Layout, terms: Terms, waiter: Waiter) -> None:
        self._sock = sock
        self._peer = terms.peer
        self._waiter = waiter
        self._opener = terms.opener()
        answers = terms.answers
        self._lost = ""
        self._looked_s = 0.0
        memory = mmap.mmap(fd, layout.total)
        self._region: Region | None = Region(memoryview(memory))
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._in, self._in_bytes = layout.calls, layout.call_bytes
        out, out_bytes = layout.answers, layout.answer_bytes
        if not answers:
            self._in, self._in_bytes, out, out_bytes = out, out_bytes, self._in, self._in_bytes
        library = load_library()
        self._send, self._send_long, self._take, self._close = (
            load_brief_library().anabranch_m2n_send,
            library.anabranch_m2n_send,
            load_brief_library().anabranch_m2n_take,
            library.anabranch_m2n_close,
        )
        # Address and length of each part of the message in hand.
        spans = (ctypes.c_uint64 * (2 * MAX_PARTS))()
        self._spans, self._spans_at = memoryview(spans).cast("B").cast("Q"), ctypes.addressof(spans)
        self._headers = [
            self._region.memory[start : start + HEADER_BYTES]
            for start in range(self._in, self._in + layout.num_slots * self._in_bytes, self._in_bytes)
        ]
        # The reader's count, and the writer's as it lies in the segment: only a hint, `take` reads it in order.
        self._taken = 0
        posted = library.anabranch_m2n_posted_offset(int(answers))
        self._posted = self._region.words[posted // 4 : posted // 4 + 1]
        end: int | None = library.anabranch_m2n_open(
            base, int(answers), base + out, out_bytes, layout.num_slots, sock.fileno()
        )
        if end is None:
            raise TransportUnavailable(f"{layout.num_slots} slots: more than a link can have")
        self._end = end
        library.anabranch_m2n_populate(base, layout.calls)
        for slot in range(layout.num_slots):
            library.anabranch_m2n_populate(base + out + slot * out_bytes, min(out_bytes, POPULATE_BYTES))
            library.anabranch_m2n_populate(base + self._in + slot * self._in_bytes, min(self._in_bytes, POPULATE_BYTES))
        waiter.add_end(end)
        waiter.watch(sock.fileno(), select.EPOLLIN, self._handle)

    def send(self, slot: int, pack: Packer, parts: Sequence[torch.Tensor]) -> None:
        if self._lost:
            raise self._error()
        spans, at, num_bytes = self._spans, 0, 0
        for part in parts:
            spans[at] = part.data_ptr()
            spans[at + 1] = length = part.nbytes
            num_bytes += length
            at += 2
        send = self._send if num_bytes <= BRIEF_BYTES else self._send_long
        code = send(self._end, slot, pack(0), HEADER_BYTES, self._spans_at, at // 2)
        if code == _EMPTY:
            self._lose("it is gone")
            raise self._error()
        assert not code, "the message is larger than its slot"

    def take(self) -> Message | None:
        slot = self._take_slot()
        if slot == _EMPTY:
            if not self._lost:
                now_s = time.monotonic()
                if now_s - self._looked_s < LOOK_S:
                    return None
                self._looked_s = now_s
                self._handle(select.EPOLLIN)
                if not self._lost:
                    return None
            # What it wrote before it ended is there by now.
            slot = self._take_slot()
            if slot == _EMPTY:
                raise self._error()
        if slot == _BROKEN:
            raise MalformedMessage(f"{self._peer}: ring: a slot that there is not")
        region = self._region
        assert region is not None
        # A copy: what is checked is what is used, whatever the peer writes meanwhile.
        header = self._opener(bytes(self._headers[slot]))
        return Message(slot, header, region, self._in + slot * self._in_bytes + HEADER_BYTES)

    def _take_slot(self) -> int:
        if not self._end or self._posted[0] == self._taken:
            return _EMPTY
        slot: int = self._take(self._end)
        if slot != _EMPTY:
            self._taken = (self._taken + 1) & 0xFFFFFFFF
        return slot

    def give_back(self, slot: int) -> None:
        """Nothing to do: the peer knows from the message that this end sends next."""

    def close(self) -> None:
        if self._end:
            self._lose("closed at this end")
            self._waiter.remove_end(self._end)
            self._close(self._end)
            self._end = 0
            self._sock.close()
            self._region = None
            self._headers.clear()
            self._posted.release()

    def _handle(self, events: int) -> bool:
        """Take the bytes that were sent to wake this end; whether the peer is gone."""
        try:
            if not self._sock.recv(_WAKE_BYTES):
                self._lose("it closed the link")
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(str(error))
        return bool(self._lost)

    def _lose(self, reason: str) -> None:
        if not self._lost:
            self._lost = f"{self._peer}: {reason}"
            self._waiter.forget(self._sock.fileno())

    def _error(self) -> PeerLost:
        # A new one each time: one that was kept would keep the frames that it passed, and the memory with them.
        return PeerLost(self._lost)
