"""An attention rank's end of a link: what is out, and which answer belongs to what."""

from __future__ import annotations

import functools
from collections.abc import Callable

from anabranch.errors import ChecksumMismatch, MalformedMessage
from transport.m2n.base import ChannelShape
from transport.m2n.body import call_parts, check_body, view_answer
from transport.m2n.header import Header, check_answer, pack_call
from transport.m2n.messages import Answer, Call
from transport.m2n.pipe import Pipe


class PipeLink:
    """See `Link`. Every answer is compared with its call, and one to a call that is not out is refused.

    Args:
        incarnation: of this end.
        closed: called when the link is closed.
    """

    def __init__(
        self, pipe: Pipe, shape: ChannelShape, peer: str, incarnation: int, closed: Callable[[PipeLink], None]
    ) -> None:
        self.peer = peer
        self._pipe = pipe
        self._shape = shape
        self._incarnation = incarnation
        self._closed = closed
        # By ticket: the call and the slot that it lies in.
        self._out: dict[int, tuple[Call, int]] = {}
        # One more than may be out: an answer is still looked at when its successor is sent.
        self._free = list(range(shape.num_slots + 1))
        # The slots of the answer that was given last: of the pipe, and of its call.
        self._shown: tuple[int, int] | None = None

    @property
    def num_free(self) -> int:
        return self._shape.num_slots - len(self._out)

    def send(self, call: Call) -> None:
        if self.num_free <= 0 or call.ticket in self._out:
            raise ValueError(f"ticket {call.ticket}: {len(self._out)} calls are out, of {self._shape.num_slots}")
        parts = call_parts(call, self._shape)
        slot = self._free.pop()
        self._out[call.ticket] = (call, slot)
        self._pipe.send(slot, functools.partial(pack_call, call, self._shape, self._incarnation), parts)

    def receive(self) -> Answer | None:
        if self._shown is not None:
            of_pipe, of_call = self._shown
            self._shown = None
            self._pipe.give_back(of_pipe)
            self._free.append(of_call)
        try:
            message = self._pipe.take()
            if message is None:
                return None
            header = message.header
            call, slot = self._find(header)
            check_answer(header, call, self._shape)
            check_body(message)
        except (MalformedMessage, ChecksumMismatch):
            self.close()
            raise
        del self._out[header.ticket]
        self._shown = (message.slot, slot)
        return view_answer(message, self._shape)

    def _find(self, header: Header) -> tuple[Call, int]:
        found = self._out.get(header.ticket)
        if found is None:
            raise MalformedMessage(f"ticket: {header.ticket} is not out at {self.peer}, or was answered before")
        return found

    def close(self) -> None:
        self._pipe.close()
        self._closed(self)
