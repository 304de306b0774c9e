"""The cost rule: the cheaper of copying out and in and of computing again, by what was measured."""

from __future__ import annotations

import pytest

from anabranch.config.options import Preemption
from anabranch.schedule.preemption import PreemptionRule, TokenCost

pytestmark = pytest.mark.unit


def rule(choice: Preemption = "auto", block_bytes: int = 1000, copy_bytes_per_s: float = 1e6) -> PreemptionRule:
    return PreemptionRule(choice, block_bytes=block_bytes, copy_bytes_per_s=copy_bytes_per_s)


def test_kv_is_kept_until_a_cost_is_known() -> None:
    assert rule().offloads(num_blocks=100, num_computed=1)


def test_the_cheaper_way_is_taken() -> None:
    given = rule()
    given.cost.measured(100, 0.1)  # 1 ms a token
    # Ten blocks there and back: 20 kB at 1 MB/s, 20 ms.
    assert given.offloads(num_blocks=10, num_computed=21)
    assert not given.offloads(num_blocks=10, num_computed=20)
    # A slower rank, or larger blocks, move the line in proportion.
    slow = rule(block_bytes=2000, copy_bytes_per_s=0.5e6)
    slow.cost.measured(100, 0.1)
    assert slow.offloads(num_blocks=10, num_computed=81)
    assert not slow.offloads(num_blocks=10, num_computed=80)


@pytest.mark.parametrize(("choice", "expected"), [("offload", True), ("recompute", False)])
def test_a_choice_that_is_forced_asks_for_no_cost(choice: Preemption, expected: bool) -> None:
    given = rule(choice)
    assert given.offloads(num_blocks=1, num_computed=1) == expected
    given.cost.measured(1, 1e-9 if expected else 1e9)
    assert given.offloads(num_blocks=1000, num_computed=1) == expected


@pytest.mark.parametrize("choice", ["auto", "offload", "recompute"])
def test_nothing_computed_is_nothing_to_keep(choice: Preemption) -> None:
    assert not rule(choice).offloads(num_blocks=3, num_computed=0)


def test_a_cost_is_weighed_by_tokens_and_follows_change() -> None:
    cost = TokenCost()
    assert cost.per_token_s is None
    cost.measured(1000, 1.0)
    cost.measured(1, 0.5)  # one slow step of a single token says little about a prompt's token
    assert cost.per_token_s == pytest.approx((0.9 + 0.5) / (900 + 1))
    for _ in range(60):
        cost.measured(100, 1.0)
    assert cost.per_token_s == pytest.approx(0.01, rel=0.02)
