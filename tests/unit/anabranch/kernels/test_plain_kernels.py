"""The reference kernels against transformers' formulas and PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from anabranch.kernels.plain import PlainKernels, gather_context

pytestmark = pytest.mark.unit
plain = PlainKernels()
MakeCase = Callable[..., Any]


def test_rms_norm_is_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
        norm.weight.data = torch.randn(96).to(dtype)
        x = (torch.randn(7, 96) * 3).to(dtype)
        assert torch.equal(plain.rms_norm(x, norm.weight.data, 1e-5), norm(x))


def test_rotary_is_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(5, 6, 16), torch.randn(5, 2, 16)
    angle = torch.randn(5, 8).repeat(1, 2)
    want_q, want_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angle.cos()[None], angle.sin()[None]
    )
    torch.testing.assert_close(plain.rotary(q, angle.cos(), angle.sin()), want_q[0].transpose(0, 1))
    torch.testing.assert_close(plain.rotary(k, angle.cos(), angle.sin()), want_k[0].transpose(0, 1))


def test_partial_rotary_is_transformers() -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    q, k = torch.randn(5, 6, 16), torch.randn(5, 2, 16)
    angle = torch.randn(5, 5).repeat(1, 2)
    want_q, _ = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angle.cos()[None], angle.sin()[None]
    )
    found = plain.rotary(q, angle.cos(), angle.sin())
    torch.testing.assert_close(found, want_q[0].transpose(0, 1))
    assert torch.equal(found[..., 10:], q[..., 10:])


def test_store_kv_writes_its_slots_alone(make_case: MakeCase) -> None:
    case = make_case(lens=[(3, 7)], heads=4, kv_heads=2, head_dim=8, block_size=4)
    before = case.kv.k.clone()
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    plain.store_kv(k, v, case.kv, case.batch.slots_T)
    k_slots, v_slots = case.kv.slots()
    assert torch.equal(k_slots[case.batch.slots_T], k)
    assert torch.equal(v_slots[case.batch.slots_T], v)
    assert int((case.kv.k != before).any(-1).any(-1).sum()) == 3


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (1, 1), (7, 7), (8, 1)])
def test_paged_attention_is_sdpa(make_case: MakeCase, heads: int, kv_heads: int, window: int | None) -> None:
    lens = [(1, 1), (4, 9), (1, 33), (17, 17)]
    case = make_case(lens=lens, heads=heads, kv_heads=kv_heads, head_dim=16, block_size=4)
    scale = 0.3
    out, lse = plain.paged_attention(case.q, case.kv, case.batch, scale, window)
    for b, context_len in enumerate(case.batch.context_lens):
        rows = slice(*case.batch.query_starts[b : b + 2])
        num_new = rows.stop - rows.start
        k, v = gather_context(case.kv, case.batch.block_tables_BN[b], context_len)
        query = torch.arange(context_len - num_new, context_len)[:, None]
        key = torch.arange(context_len)
        seen = (key <= query) & (key > query - (window or context_len))
        want = functional.scaled_dot_product_attention(
            case.q[rows].transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        torch.testing.assert_close(out[rows], want, rtol=1e-5, atol=1e-5)
        scores = torch.einsum("thd,chd->thc", case.q[rows], k.repeat_interleave(heads // kv_heads, 1)) * scale
        want_lse = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse[rows], want_lse, rtol=1e-5, atol=1e-5)


def test_paged_attention_of_long_chunks_is_cut_into_rows(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(lens=[(11, 20), (3, 3)], heads=4, kv_heads=2, head_dim=8, block_size=4)
    whole = plain.paged_attention(case.q, case.kv, case.batch, 0.5, 6)
    monkeypatch.setattr("anabranch.kernels.plain.MAX_SCORE_ROWS", 4)
    cut = plain.paged_attention(case.q, case.kv, case.batch, 0.5, 6)
    torch.testing.assert_close(cut[0], whole[0])
    torch.testing.assert_close(cut[1], whole[1])


def test_experts_skip_those_not_held() -> None:
    x = torch.randn(6, 8)
    gate_up, down = torch.randn(3, 10, 8), torch.randn(3, 8, 5)
    experts = torch.tensor([[0, 2], [-1, 1], [1, -1], [-1, -1], [2, 0], [0, 1]])
    weights = torch.rand(6, 2)
    want = torch.zeros(6, 8)
    for t in range(6):
        for s in range(2):
            e = int(experts[t, s])
            if e >= 0:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                want[t] += weights[t, s] * (down[e] @ (functional.silu(gate) * up))
    torch.testing.assert_close(plain.experts(x, weights, experts, gate_up, down), want, rtol=1e-4, atol=1e-5)
