"""What a front end gets for an accepted request: its answer, part by part, until one end."""

from __future__ import annotations

from typing import Protocol

from anabranch.errors import AnabranchError
from orchestrator.answer import Chunk, Finished
from orchestrator.lifecycle import Lifecycle


class Generation(Protocol):
    """Life: `next` until it gives Finished or raises, then `leave`; `leave` at any time before, too."""

    @property
    def request_id(self) -> str:
        """The client's name for the request, or the one that was drawn."""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...

    async def next(self) -> Chunk | Finished:
        """What the client is told next; the last is Finished. Raises AnabranchError, the end of what went wrong."""
        ...

    def leave(self, reason: AnabranchError) -> None:
        """The caller reads no more; where nobody else does, the request ends. Idempotent."""
        ...


class OwnGeneration:
    """A request with one reader, which ends with it."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self.request_id = lifecycle.client_id
        self.num_prompt_tokens = len(lifecycle.request.prompt_ids)

    async def next(self) -> Chunk | Finished:
        return await self._lifecycle.answer.next()

    def leave(self, reason: AnabranchError) -> None:
        self._lifecycle.inbox.stop(reason)
