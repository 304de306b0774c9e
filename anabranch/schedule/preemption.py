"""How a sequence is preempted: its KV is kept in host memory, or computed again. Whichever takes less time.

    offload:    its bytes go out and come back         2 x bytes / copy rate
    recompute:  its tokens are computed again           tokens x seconds per token

The copy rate is measured at the start. What a token costs is measured all along: on a colocated worker by its own
prompt steps; on a decode worker from the arrival of a reservation to its commit, since a sequence that is sent
back queues for prefill, is computed there and streamed here again. Until something was measured, KV is kept.
"""

from __future__ import annotations

from anabranch.config.options import Preemption

# How much of the average stays when a token's cost is measured anew.
_DECAY = 0.9


class TokenCost:
    """Seconds per token, averaged over the last dozen measurements; long ones count more than short ones."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    @property
    def per_token_s(self) -> float | None:
        """None until something was measured."""
        return self._seconds / self._tokens if self._tokens else None

    def measured(self, num_tokens: int, seconds: float) -> None:
        assert num_tokens > 0 and seconds >= 0.0
        self._seconds = self._seconds * _DECAY + seconds
        self._tokens = self._tokens * _DECAY + num_tokens


class PreemptionRule:
    """Chooses for one victim at a time.

    Args:
        choice: `offload` or `recompute` whatever it costs, or `auto`.
        block_bytes: of one block of the rank that holds most; ranks copy side by side.
        copy_bytes_per_s: of the slowest rank.
    """

    def __init__(self, choice: Preemption, *, block_bytes: int, copy_bytes_per_s: float) -> None:
        assert copy_bytes_per_s > 0.0
        self.choice = choice
        self.block_bytes = block_bytes
        self.copy_bytes_per_s = copy_bytes_per_s
        self.cost = TokenCost()

    def offloads(self, *, num_blocks: int, num_computed: int) -> bool:
        """Whether to keep the KV of `num_computed` tokens, which fill `num_blocks` blocks, in host memory."""
        if num_computed == 0 or self.choice == "recompute":
            return False
        per_token_s = self.cost.per_token_s
        if self.choice == "offload" or per_token_s is None:
            return True
        return 2 * num_blocks * self.block_bytes / self.copy_bytes_per_s < num_computed * per_token_s
