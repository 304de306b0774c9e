"""Whose failure it is that an epoch of a request did not end well, and which workers are blamed for it.

The one classification: what `is_workers_failure` holds of, or is named a WorkerFailure here, lets the request go on
elsewhere. Anything else is the request's own end.

    invalid_request, context_exceeded, out_of_blocks    the request's; every worker would say it
    draining                                            nobody's: the worker gives the request back
    every other code, known or not                      the worker's
"""

from __future__ import annotations

from collections.abc import Iterable

from anabranch.errors import (
    AnabranchError,
    Draining,
    FfnUnavailable,
    InvalidRequest,
    OutOfBlocks,
    TransportError,
    WorkerDied,
)
from orchestrator.attempt import Attempt
from orchestrator.member import Member


def is_workers_failure(error: AnabranchError) -> bool:
    """Whether a worker that ends a request with this has failed, so that another worker may do better."""
    return not isinstance(error, InvalidRequest | OutOfBlocks | Draining)


class WorkerFailure(Exception):
    """A worker has failed an epoch of a request.

    Attributes:
        error: what happened.
        blamed: workers that the request shall keep away from.
        suspect: the living worker whose fault it is likely to be; None: it is known to be dead, or was only full.
    """

    def __init__(self, error: AnabranchError, blamed: Iterable[Member], suspect: Member | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.blamed = tuple(blamed)
        self.suspect = suspect


def death(member: Member, error: AnabranchError) -> WorkerFailure:
    """A worker that the epoch needs is gone."""
    return WorkerFailure(error, [member])


def misconduct(member: Member, error: AnabranchError) -> WorkerFailure:
    """A worker said what no worker may say."""
    return WorkerFailure(error, [member], member)


def report(attempt: Attempt, member: Member, error: AnabranchError) -> WorkerFailure:
    """A worker has ended the epoch with `error`.

    What was lost between two workers may be either's fault, so both are blamed; the one that did not notice it is
    the suspect, since one that is dead or broken does not.
    """
    if isinstance(error, TransportError) and not attempt.committed:
        others = [other for other in attempt.route.members if other is not member]
        return WorkerFailure(error, [member, *others], others[0] if others else member)
    # One that dies says so of all its requests first, and an FFN worker's absence is no fault of those it is missed by.
    blameless = isinstance(error, WorkerDied | FfnUnavailable)
    return WorkerFailure(error, [member], None if blameless else member)


def lateness(attempt: Attempt, state: str, error: AnabranchError) -> WorkerFailure:
    """A stage has taken longer than it may. A worker without KV blocks for it is full, and no suspect."""
    decode = attempt.route.decode
    if state == "prefilling":
        return WorkerFailure(error, attempt.route.members, attempt.route.computes_prompt)
    return WorkerFailure(error, [decode], decode if state == "decoding" else None)
