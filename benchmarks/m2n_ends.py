"""Both ends of an M2N channel in one process, and calls to send over it; for benchmarks and tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from transport.m2n import Answer, Arrived, Call, Combine, Link, LinkMaker, Listener
from transport.m2n.base import Dialled

TIMEOUT_S = 60.0
NO_INDEX = torch.empty(0, dtype=torch.int32)
NO_WEIGHTS = torch.empty(0)


def make_call(
    rows_TC: torch.Tensor,
    *,
    ticket: int = 0,
    step: int = 0,
    layer: int = 0,
    lane: int = 0,
    attempt: int = 0,
    experts_TS: torch.Tensor | None = None,
    weights_TS: torch.Tensor | None = None,
) -> Call:
    """A call of a dense layer; with experts, of a sparse one by slots; with weights too, by sums."""
    rows_A = experts_A = NO_INDEX
    weights_A, combine = NO_WEIGHTS, Combine.ROWS
    if experts_TS is not None:
        num_rows, num_choices = experts_TS.shape
        combine = Combine.SLOTS if weights_TS is None else Combine.SUMS
        rows_A = torch.arange(num_rows, dtype=torch.int32).repeat_interleave(num_choices)
        experts_A = experts_TS.flatten().int()
        weights_A = NO_WEIGHTS if weights_TS is None else weights_TS.flatten()
    return Call(
        ticket=ticket,
        step=step,
        layer=layer,
        lane=lane,
        attempt=attempt,
        placement=1,
        combine=combine,
        rows_TC=rows_TC,
        rows_A=rows_A,
        experts_A=experts_A,
        weights_A=weights_A,
    )


def connect(listener: Listener, maker: LinkMaker, addresses: dict[str, str] | None = None) -> Link:
    """A link between the two; raises what `dial` raises. The listener must have no calls meanwhile.

    Args:
        addresses: where to connect to, if not straight to the listener.
    """
    made: list[Dialled] = []
    failed: list[Exception] = []

    def dial() -> None:
        try:
            made.append(maker.dial(listener.addresses if addresses is None else addresses, "node"))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=dial, name="connect")
    thread.start()
    while thread.is_alive():
        assert not listener.poll()
        thread.join(0.001)
    if failed:
        raise failed[0]
    return made[0].attach()


def next_calls(listener: Listener, number: int = 1) -> list[Arrived]:
    """The next calls at the node. Raises AssertionError after TIMEOUT_S."""
    calls: list[Arrived] = []

    def poll() -> bool:
        listener.wait(0.01)
        calls.extend(listener.poll())
        return len(calls) >= number

    _await(poll, f"{number} calls arrive")
    return calls


def next_answer(link: Link, maker: LinkMaker) -> Answer:
    """The next answer. Raises AssertionError after TIMEOUT_S, and what `Link.receive` raises."""
    if (answer := link.receive()) is not None:
        return answer
    answers: list[Answer] = []

    def take() -> bool:
        maker.wait(0.01)
        answer = link.receive()
        answers.extend([] if answer is None else [answer])
        return bool(answers)

    _await(take, "an answer comes")
    return answers[0]


def _await(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {TIMEOUT_S:g} s"
