"""How long a request may be, and what sets the limit."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.protocol.workers import WorkerInfo


@dataclass(frozen=True, kw_only=True)
class ContextLimit:
    """Most tokens, prompt and answer, of one request.

    Attributes:
        remedy: what to change for more, to be put behind an error; empty where model or configuration set the limit.
    """

    num_tokens: int
    remedy: str = ""

    @classmethod
    def of_worker(cls, info: WorkerInfo) -> ContextLimit:
        """What a worker holds."""
        in_pool = info.num_blocks * info.block_size * info.cp
        if info.max_context < in_pool:
            return cls(num_tokens=info.max_context)
        ranks = f" on each of {info.cp} CP ranks" if info.cp > 1 else ""
        return cls(
            num_tokens=info.max_context,
            remedy=f"; the KV pool of {info.name} has {info.num_blocks} blocks of {info.block_size} tokens{ranks}: "
            f"for more, raise kv_cache or cp of the {info.role} pool",
        )
