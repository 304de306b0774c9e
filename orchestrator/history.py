"""What has become of one request's epochs so far, and whether there may be another.

An epoch that a worker failed counts against the request, whoever's fault it is: a prompt that fells workers is not
told from those that share a worker with it. Two rules keep the count fair.

  - Failures count *in a row*. An epoch that brought PROVEN_TOKENS tokens has shown that the request can be computed,
    so a failure after that is the first of a new row. More than `max_recoveries` in a row end the request.
  - The last chance is taken *alone*: a request that one more failure would end gets workers where every other request
    has brought PROVEN_TOKENS tokens or has ended, and these take no other until it has done so too. So whatever
    fells a worker then is this request, or has nothing to do with any.
"""

from __future__ import annotations

from collections import deque

from anabranch.errors import AnabranchError, OutOfBlocks, RecoveriesExhausted, error_from_code
from orchestrator.answer import RouteTaken
from orchestrator.attempt import Attempt
from orchestrator.member import Member
from orchestrator.worker_failure import WorkerFailure

# The latest routes that a client is told of.
MAX_ROUTES = 64


class History:
    """Of one request.

    Args:
        max_recoveries: failures in a row after which it goes on.
        max_given_back: times in a row that it is given back without a new token, after which it goes on.

    Attributes:
        avoid: workers that have failed it; one that came again is another one.
        num_recoveries: failures after which it went on.
    """

    def __init__(self, *, max_recoveries: int, max_given_back: int) -> None:
        self._max_recoveries = max_recoveries
        self._max_given_back = max_given_back
        self._in_a_row: list[WorkerFailure] = []
        self._num_given_back = 0
        self._routes: deque[RouteTaken] = deque(maxlen=MAX_ROUTES)
        self.avoid: set[Member] = set()
        self.num_recoveries = 0

    @property
    def alone(self) -> bool:
        """Whether the next epoch is the last chance, and is to be taken alone."""
        return 0 < len(self._in_a_row) >= self._max_recoveries

    @property
    def routes(self) -> tuple[RouteTaken, ...]:
        """Of the epochs that are over, the oldest first."""
        return tuple(self._routes)

    def ended(self, attempt: Attempt) -> None:
        """The answer has ended with this epoch."""
        self._took(attempt, "")

    def given_back(self, attempt: Attempt, why: str) -> None:
        """Workers gave the request back. Raises OutOfBlocks where they have too often without a new token."""
        self._took(attempt, why)
        self._num_given_back = 0 if attempt.num_tokens else self._num_given_back + 1
        if self._num_given_back > self._max_given_back:
            raise OutOfBlocks(
                f"max_retries: workers gave the request back {self._num_given_back} times without a new token"
            )

    def failed(self, attempt: Attempt, failure: WorkerFailure) -> None:
        """A worker failed the epoch. Raises the request's end where that was once too often."""
        self._took(attempt, failure.error.code)
        self.avoid.update(failure.blamed)
        if attempt.proven:
            self._in_a_row.clear()
        self._in_a_row.append(failure)
        if len(self._in_a_row) > self._max_recoveries:
            raise self._end() from failure
        self.num_recoveries += 1

    def _end(self) -> AnabranchError:
        if self._max_recoveries == 0:
            # All requests of a dead worker are told the same error, and each raises its own.
            error = self._in_a_row[0].error
            return error_from_code(error.code, str(error))
        each = "; ".join(
            f"{' and '.join(member.name for member in failure.blamed)}: {failure.error}" for failure in self._in_a_row
        )
        return RecoveriesExhausted(
            f"max_recoveries: {len(self._in_a_row)} times in a row workers failed this request, which may be what "
            f"fells them ({each})"
        )

    def _took(self, attempt: Attempt, left: str) -> None:
        self._routes.append(RouteTaken(workers=attempt.route.names, num_tokens=attempt.num_tokens, left=left))
