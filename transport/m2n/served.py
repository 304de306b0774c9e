"""A node's end of a link: calls that have come and are not answered yet."""

from __future__ import annotations

import functools

import msgspec
import torch

from anabranch.errors import ChecksumMismatch, MalformedMessage
from anabranch.system.logs import LimitedLog
from transport.m2n.base import Arrived, ChannelShape
from transport.m2n.body import answer_parts, check_body, view_call
from transport.m2n.header import Header, check_call, pack_answer
from transport.m2n.messages import Answer, Status
from transport.m2n.pipe import Message, Pipe


class Pending(msgspec.Struct, frozen=True, eq=False):
    """The listener's token: where a call lies, and what its answer repeats."""

    link: ServedLink
    slot: int
    header: Header


class ServedLink:
    """A link from one attention rank.

    Attributes:
        number: of this listener's links; see `Arrived.sender`.
        peer: for logs.
    """

    def __init__(
        self, pipe: Pipe, shape: ChannelShape, number: int, peer: str, incarnation: int, log: LimitedLog
    ) -> None:
        self.number = number
        self.peer = peer
        self._pipe = pipe
        self._shape = shape
        self._incarnation = incarnation
        self._log = log
        self._pending: dict[int, Pending] = {}

    def poll(self, now_s: float) -> list[Arrived]:
        """Calls that have come whole. Raises what `Pipe.take` does: the link must end."""
        arrived: list[Arrived] = []
        while (message := self._pipe.take()) is not None:
            if message.slot in self._pending or len(self._pending) >= self._shape.num_slots:
                raise MalformedMessage(f"{self.peer}: slots: it sends more calls than its link may have out")
            pending = self._pending[message.slot] = Pending(self, message.slot, message.header)
            try:
                check_call(message.header, self._shape)
                check_body(message)
                call = view_call(message, self._shape)
            except (MalformedMessage, ChecksumMismatch) as error:
                self._log.warning(f"{self.peer}: call {message.header.ticket}: {error}")
                self._send(pending, self._refusal(message), [])
                continue
            arrived.append(Arrived(call, self.number, now_s, pending))
        return arrived

    def answer(self, arrived: Arrived, pending: Pending, answer: Answer) -> None:
        """Copy an answer out, unless the call was answered before. Raises PeerLost, ValueError."""
        if self._pending.get(pending.slot) is pending:
            self._send(pending, answer, answer_parts(answer, arrived.call, self._shape))

    def _send(self, pending: Pending, answer: Answer, parts: list[torch.Tensor]) -> None:
        pack = functools.partial(pack_answer, answer, pending.header, self._shape, self._incarnation)
        self._pipe.send(pending.slot, pack, parts)
        del self._pending[pending.slot]
        self._pipe.give_back(pending.slot)

    def _refusal(self, message: Message) -> Answer:
        header = message.header
        rows_RC = torch.empty(0, self._shape.hidden_size)
        return Answer(ticket=header.ticket, attempt=header.attempt, status=Status.MALFORMED, rows_RC=rows_RC)

    def close(self) -> None:
        self._pipe.close()
        self._pending.clear()
