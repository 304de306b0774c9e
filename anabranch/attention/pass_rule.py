"""Pass-KV or pass-Q: which of the two shall travel the ring in a step, by what each would cost.

A ring step's transfer hides behind a ring step's attention; what does not fit is exposed. Attention is the
same in both variants, so the one with less exposed time wins. Sent by each rank over the whole ring, with T
new and P cached tokens, H query heads, K KV heads, head dim D, e bytes per element and N ranks:

    pass-KV   (N - 1) / N * (T + P) * 2 K D e
    pass-Q    (N - 1) / N * T * H D e            queries, and as much again for results on their way home

The results of all steps but the last travel behind the attention of the steps after them; the last ones
cannot, and are always exposed. So pass-Q pays where the cache is long, the chunk is short and the group of
query heads per KV head is small; and pass-KV wherever the chunk is long enough to hide it, which is where
`T >= N * F * K * e / (2 * H * B)`, F being attention's FLOP/s and B the link's bytes/s, whatever P is.

Source: Context Parallelism for Scalable Million-Token Inference (2024), section 3.4, equations 1 to 3 and
algorithm 1, here for ragged batches and with the latency of a message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.attention.ring import Variant
from anabranch.errors import ConfigError
from anabranch.step.plan import StepPlan

PassChoice = Literal["auto", "pass_kv", "pass_q"]


class RingRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost rule takes a machine to do; the same on all ranks, because all have to choose alike.

    Attributes:
        attention_flops_per_s: of one rank's attention.
        link_bytes_per_s: from one rank to the next while both compute.
        message_s: the cost of a message of no length.
        taken_share: how much of a transfer's time attention loses to it: 0 where a DMA engine moves the bytes,
            up to 1 where the cores that compute do.

    Raises:
        ConfigError: a rate is not above 0, the latency is negative, or the share not between 0 and 1.
    """

    attention_flops_per_s: float
    link_bytes_per_s: float
    message_s: float = 0.0
    taken_share: float = 0.0

    def __post_init__(self) -> None:
        for key in ("attention_flops_per_s", "link_bytes_per_s"):
            if not getattr(self, key) > 0.0:
                raise ConfigError(f"ring_rates.{key}", getattr(self, key), "must be above 0")
        if not self.message_s >= 0.0:
            raise ConfigError("ring_rates.message_s", self.message_s, "must be at least 0")
        if not 0.0 <= self.taken_share <= 1.0:
            raise ConfigError("ring_rates.taken_share", self.taken_share, "must be between 0 and 1")


class HeadShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Heads of one rank.

    Attributes:
        num_heads, num_kv_heads: query and KV heads of one TP rank.
        head_dim: elements per head.
        element_bytes: of Q, K, V and results.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int


class RingCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer's ring costs one rank, on average over the ranks.

    Attributes:
        attention_s: all ring steps' attention.
        sent_bytes: by one rank.
        exposed_s: transfer time that attention does not hide, or that is taken from it.
    """

    attention_s: float
    sent_bytes: float
    exposed_s: float


def ring_cost(variant: Variant, chunks: list[tuple[int, int]], shape: HeadShape, cp: int, rates: RingRates) -> RingCost:
    """Predict one layer's ring.

    Args:
        chunks: per sequence, (new tokens, cached tokens).
    """
    new = sum(num_new for num_new, _ in chunks)
    context = sum(num_new + cached for num_new, cached in chunks)
    pairs = sum(num_new * cached + num_new * (num_new + 1) / 2 for num_new, cached in chunks)
    attention_s = 4.0 * shape.num_heads * shape.head_dim * pairs / cp / rates.attention_flops_per_s
    step_s = attention_s / cp
    row_bytes = shape.head_dim * shape.element_bytes

    def transfer_s(num_bytes: float) -> float:
        return rates.message_s + num_bytes / rates.link_bytes_per_s

    def behind_attention_s(taken_s: float) -> float:
        """What shows of a transfer that runs beside one ring step's attention."""
        lost_s = rates.taken_share * taken_s
        return lost_s + max(0.0, taken_s - lost_s - step_s)

    if variant == "pass_kv":
        hop_bytes = 2.0 * shape.num_kv_heads * row_bytes * context / cp
        exposed_s = (cp - 1) * behind_attention_s(transfer_s(hop_bytes))
        return RingCost(attention_s=attention_s, sent_bytes=(cp - 1) * hop_bytes, exposed_s=exposed_s)
    query_bytes = shape.num_heads * row_bytes * new / cp
    # A result travels with its LSE (float32), and with the new KV that its home rank stores.
    home_bytes = query_bytes + 4.0 * shape.num_heads * new / cp + 2.0 * shape.num_kv_heads * row_bytes * new / cp / cp
    exposed_s = 0.0
    if cp > 1:
        # First only queries travel, then queries and a result at a time, and last a result alone.
        first_s = transfer_s(query_bytes)
        both_s = first_s + transfer_s(home_bytes)
        exposed_s = behind_attention_s(first_s) + (cp - 2) * behind_attention_s(both_s) + transfer_s(home_bytes)
    return RingCost(attention_s=attention_s, sent_bytes=(cp - 1) * (query_bytes + home_bytes), exposed_s=exposed_s)


class PassRule:
    """Chooses the variant of each step; a pure function of the plan, so all ranks choose alike.

    Args:
        choice: `auto`, or the variant to force.
    """

    def __init__(self, choice: PassChoice, shape: HeadShape, cp: int, rates: RingRates) -> None:
        self.choice = choice
        self.shape = shape
        self.cp = cp
        self.rates = rates

    def choose(self, plan: StepPlan, window: int | None = None) -> Variant:
        """The variant for a step.

        Args:
            window: the widest of the model's layers; cached tokens before it do not travel.
        """
        chunks = [(sequence.num_new_tokens, _seen(sequence.start, window)) for sequence in plan.sequences]
        return self.choose_chunks(chunks)

    def choose_chunks(self, chunks: list[tuple[int, int]]) -> Variant:
        """The variant for chunks of (new tokens, cached tokens); pass-KV where both expose the same."""
        if self.choice != "auto":
            return self.choice
        kv, q = (ring_cost(variant, chunks, self.shape, self.cp, self.rates) for variant in ("pass_kv", "pass_q"))
        return "pass_q" if q.exposed_s < kv.exposed_s else "pass_kv"


def _seen(cached: int, window: int | None) -> int:
    return cached if window is None else min(cached, max(window - 1, 0))
