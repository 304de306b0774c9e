"""What a client asks for, whatever protocol it came by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from anabranch.request.sampling_params import SamplingParams
from orchestrator.client_deadline import ClientDeadline
from orchestrator.served_model import Prompt


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request as a client sent it: nothing is checked but sizes.

    Attributes:
        prompt: text or messages; None: the prompt is `prompt_ids`, which are not copied before there is room for them.
        sampling: with the client's own stop tokens alone.
        ignore_eos: the model's stop tokens are not to be added to these.
        client_id: the client's name for the request; empty: it gave none.
        priority, tenant, idempotency_key: as in the `.proto`; None where the client gave none.
        num_bytes: what the request takes in memory before it is encoded, for as long as its call lasts.
    """

    prompt: Prompt | None
    prompt_ids: Sequence[int] = ()
    sampling: SamplingParams
    ignore_eos: bool = False
    client_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    tenant: str | None = None
    idempotency_key: str | None = None
    deadline: ClientDeadline
    num_bytes: int

    def fingerprint(self) -> bytes:
        """Alike for requests that ask for the same answer; 32 bytes."""
        parts = (self.prompt, tuple(self.prompt_ids), self.sampling, self.ignore_eos, self.cache_salt)
        return hashlib.sha256(msgspec.msgpack.encode(parts, order="deterministic")).digest()
