"""The two ends of the M2N channel as their callers see them.

Both ends are driven by the thread that computes: no progress thread, no future, no callback. One thread calls all
methods of an end but `dial` and `wake`. A message is a fixed, versioned header and then tensors, as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch

from transport.m2n.messages import Answer, Call


@dataclass(frozen=True, kw_only=True)
class ChannelShape:
    """What both ends of a link must agree on; slots are made of this size when it connects.

    Attributes:
        model: fingerprint of the model.
        max_rows: most rows of a call.
        max_choices: most assignments of a row; 1 where no layer is sparse.
        shared_expert: who has the expert that all rows choose: attn or ffn; attn too where there is none.
        num_slots: most calls of one link whose answers have not been taken.
    """

    model: str
    dtype: torch.dtype
    hidden_size: int
    max_rows: int
    max_choices: int
    num_slots: int
    shared_expert: str = "attn"


class Link(Protocol):
    """An attention rank's way to one FFN node.

    Attributes:
        peer: the node, for logs.
        num_free: calls that can be sent now.
    """

    peer: str

    @property
    def num_free(self) -> int: ...

    def send(self, call: Call) -> None:
        """Copy a call out; never waits. The caller checks `num_free`.

        Raises:
            PeerLost: the node is gone, or the link was closed.
        """
        ...

    def receive(self) -> Answer | None:
        """The next answer that has come whole, None where there is none; never waits.

        Its rows are valid until the next call of `receive` or `close` of this link.

        Raises:
            PeerLost: the node is gone.
            MalformedMessage, ChecksumMismatch: it sent what no node sends; close the link.
        """
        ...

    def close(self) -> None:
        """Give the link up: what the node writes from now on is seen by nobody. Idempotent."""
        ...


class Dialled(Protocol):
    """A connection that a node has taken, on its way to be a link."""

    def attach(self) -> Link:
        """Make it a link; on the thread that computes. Raises PeerLost where the node has gone meanwhile."""
        ...

    def close(self) -> None:
        """Give it up; from any thread. Nothing happens once it is attached."""
        ...


class LinkMaker(Protocol):
    """An attention rank's end: makes links and waits for all of them at once."""

    def dial(self, addresses: dict[str, str], peer: str) -> Dialled:
        """Reach a node over the best backend that both have. Blocks for at most `connect_timeout_s`; from any thread.

        Args:
            addresses: backend name -> address, as the node's `Listener.addresses` says.
            peer: for logs.

        Raises:
            PeerLost, DeadlineExceeded: nobody there, or no answer.
            ConfigError: the node serves another model, dtype, shape or wire version; both sides' values.
            TransportUnavailable: no backend in common.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Return as soon as an answer may have come on any link, or a link may be lost; at the latest after this.

        Spins for a short time first (the other side answers within a fraction of a millisecond), then sleeps.
        """
        ...

    def close(self) -> None:
        """Close every link."""
        ...


class Arrived(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A call at its node; its tensors are valid until it is answered.

    Attributes:
        sender: which link; for statistics and fairness.
        arrived_s: `time.monotonic()`.
        token: the listener's own.
    """

    call: Call
    sender: int
    arrived_s: float
    token: object


class Listener(Protocol):
    """An FFN node's end: takes links from any number of attention ranks.

    Attributes:
        addresses: backend name -> address, complete once it is made.
    """

    @property
    def addresses(self) -> dict[str, str]: ...

    @property
    def num_links(self) -> int: ...

    def poll(self) -> Sequence[Arrived]:
        """Calls that have come whole since the last time; never waits. Takes new links, drops lost ones.

        A call that cannot be understood is answered with `Status.MALFORMED` here and does not show.
        """
        ...

    def answer(self, arrived: Arrived, answer: Answer) -> None:
        """Copy an answer out; never waits. Nothing happens where its link is gone."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return as soon as `poll` may give something, at the latest after `timeout_s`. Any thread may `wake`."""
        ...

    def wake(self) -> None:
        """End a `wait` in progress, or the next one; from any thread."""
        ...

    def close(self) -> None: ...
