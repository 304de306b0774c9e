"""The choice between pass-KV and pass-Q: formulas, limits, agreement with the paper's rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.attention.pass_rule import HeadShape, PassRule, RingRates, ring_cost
from anabranch.errors import ConfigError
from anabranch.step.plan import SequencePlan, StepPlan

pytestmark = pytest.mark.unit
# Llama 3 405B on 8 GPUs of a host (TP 8), as in the paper: 16 query heads and 1 KV head per rank.
PAPER = HeadShape(num_heads=16, num_kv_heads=1, head_dim=128, element_bytes=2)
GQA3 = HeadShape(num_heads=9, num_kv_heads=3, head_dim=64, element_bytes=2)
MHA = HeadShape(num_heads=8, num_kv_heads=8, head_dim=64, element_bytes=2)
SLOW_LINK = RingRates(attention_flops_per_s=300e9, link_bytes_per_s=1e9)
FAST_LINK = RingRates(attention_flops_per_s=100e9, link_bytes_per_s=1e12)


def plan(*chunks: tuple[int, int]) -> StepPlan:
    sequences = tuple(
        SequencePlan(request_id=str(i), epoch=0, token_ids=(0,) * new, start=cached, block_ids=())
        for i, (new, cached) in enumerate(chunks)
    )
    return StepPlan(step=0, sequences=sequences)


def test_bytes_are_the_formulas() -> None:
    kv = ring_cost("pass_kv", [(600, 1000)], GQA3, 4, SLOW_LINK)
    assert kv.sent_bytes == 3 / 4 * 1600 * 2 * 3 * 64 * 2
    q = ring_cost("pass_q", [(600, 1000)], GQA3, 4, SLOW_LINK)
    assert q.sent_bytes == 3 / 4 * (600 * 9 * 64 * 2 * 2 + 600 * 9 * 4 + 600 / 4 * 2 * 3 * 64 * 2)


def test_exposed_is_what_attention_does_not_hide() -> None:
    """2 ranks, 512 new and no cached tokens: half the causal scores in each of two ring steps."""
    cost = ring_cost("pass_kv", [(512, 0)], MHA, 2, SLOW_LINK)
    step_s = 4 * 8 * 64 * (512 * 513 / 2) / 4 / 300e9
    hop_s = 256 * 2 * 8 * 64 * 2 / 1e9
    assert cost.attention_s == pytest.approx(2 * step_s)
    assert cost.exposed_s == pytest.approx(hop_s - step_s)
    assert ring_cost("pass_kv", [(512, 0)], MHA, 2, FAST_LINK).exposed_s == 0.0


def test_what_a_transfer_takes_from_attention_shows() -> None:
    """Where the computing cores copy, nothing hides, and the variant that sends less wins."""
    copying = RingRates(attention_flops_per_s=100e9, link_bytes_per_s=1e10, taken_share=1.0)
    cost = ring_cost("pass_kv", [(512, 512)], MHA, 2, copying)
    assert cost.exposed_s == pytest.approx(cost.sent_bytes / 1e10)
    half = RingRates(attention_flops_per_s=100e9, link_bytes_per_s=1e10, taken_share=0.5)
    assert ring_cost("pass_kv", [(512, 512)], MHA, 2, half).exposed_s == pytest.approx(cost.exposed_s / 2)
    assert PassRule("auto", GQA3, 2, copying).choose(plan((1000, 16_000))) == "pass_q"
    assert PassRule("auto", GQA3, 2, FAST_LINK).choose(plan((1000, 16_000))) == "pass_kv"


def test_a_long_cache_and_few_new_tokens_pass_q() -> None:
    rule = PassRule("auto", GQA3, 4, SLOW_LINK)
    assert rule.choose(plan((16, 50_000))) == "pass_q"
    assert rule.choose(plan((8000, 0))) == "pass_kv"
    assert rule.choose(plan((16, 5000), (8000, 0))) == "pass_kv"
    assert rule.choose(plan((16, 90_000), (8000, 0))) == "pass_q"


def test_a_window_shortens_the_cache() -> None:
    rule = PassRule("auto", GQA3, 4, SLOW_LINK)
    assert rule.choose(plan((200, 50_000)), window=None) == "pass_q"
    assert rule.choose(plan((200, 50_000)), window=256) == "pass_kv"


def test_nothing_to_hide_is_pass_kv() -> None:
    assert PassRule("auto", MHA, 4, FAST_LINK).choose(plan((4096, 4096))) == "pass_kv"
    assert PassRule("auto", MHA, 1, SLOW_LINK).choose(plan((1, 4096))) == "pass_kv"


def test_forced() -> None:
    assert PassRule("pass_q", MHA, 4, SLOW_LINK).choose(plan((8000, 0))) == "pass_q"
    assert PassRule("pass_kv", MHA, 4, SLOW_LINK).choose(plan((16, 50_000))) == "pass_kv"


def papers_rule(new: int, cached: int, shape: HeadShape, cp: int, rates: RingRates) -> str:
    """Algorithm 1 of the paper, with its results' way home."""
    flops, link, e = rates.attention_flops_per_s, rates.link_bytes_per_s, shape.element_bytes
    ratio = shape.num_kv_heads / shape.num_heads
    hidden = new >= cp * flops * ratio * e / (2 * link)
    dense = new / (new + cached) >= 2 * ratio - 4 * new * link / (cp * flops * e)
    return "pass_kv" if hidden or dense else "pass_q"


@pytest.mark.parametrize(("new", "cached"), [(64, 127_936), (16_000, 0), (2560, 125_440), (64_000, 64_000), (1, 5000)])
@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("shape", [PAPER, GQA3, MHA])
def test_agrees_with_the_paper_away_from_the_border(new: int, cached: int, cp: int, shape: HeadShape) -> None:
    rates = RingRates(attention_flops_per_s=50e12, link_bytes_per_s=26e9)
    kv, q = (ring_cost(variant, [(new, cached)], shape, cp, rates).exposed_s for variant in ("pass_kv", "pass_q"))
    if max(kv, q) > 2.5 * min(kv, q):
        assert PassRule("auto", shape, cp, rates).choose(plan((new, cached))) == papers_rule(
            new, cached, shape, cp, rates
        )


@given(
    new=st.integers(1, 10_000),
    cached=st.integers(0, 100_000),
    cp=st.integers(1, 8),
    link=st.floats(1e6, 1e12),
)
def test_the_choice_exposes_less(new: int, cached: int, cp: int, link: float) -> None:
    rates = RingRates(attention_flops_per_s=1e11, link_bytes_per_s=link, message_s=1e-5)
    costs = {
        variant: ring_cost(variant, [(new, cached)], GQA3, cp, rates).exposed_s for variant in ("pass_kv", "pass_q")
    }
    chosen = PassRule("auto", GQA3, cp, rates).choose(plan((new, cached)))
    assert costs[chosen] == min(costs.values())
    assert all(cost >= 0.0 for cost in costs.values())


@pytest.mark.parametrize("key", ["attention_flops_per_s", "link_bytes_per_s"])
def test_a_rate_that_cannot_be_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RingRates(**{"attention_flops_per_s": 1.0, "link_bytes_per_s": 1.0, key: 0.0})
    with pytest.raises(ConfigError, match="taken_share"):
        RingRates(attention_flops_per_s=1.0, link_bytes_per_s=1.0, taken_share=1.5)
    with pytest.raises(ConfigError, match="message_s"):
        RingRates(attention_flops_per_s=1.0, link_bytes_per_s=1.0, message_s=float("nan"))
