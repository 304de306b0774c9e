"""Meshes that do not fit are refused with the key, the value, the numbers and the remedy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.config.worker import WorkerConfig
from anabranch.engine import fit
from anabranch.engine.ffn_shares import ffn_shares
from anabranch.errors import ConfigError
from anabranch.model.config import ModelConfig
from anabranch.model.size import attention_bytes, expert_bytes, num_experts, weight_bytes
from anabranch.model.sources import resolve_model
from anabranch.parallel.reshard import tokens_of
from tests.support.families import build

pytestmark = pytest.mark.unit

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    build("llama-gqa-tied").save_pretrained(folder)  # 6 query heads, 2 KV heads, 3 layers, 40 FFN features
    return resolve_model(str(folder)).config()


def worker(**options: object) -> WorkerConfig:
    given = {"role": "decode", "name": "decode-0", "orchestrator": "", "model": "m", "dtype": "float32", **options}
    return msgspec.convert(given, WorkerConfig)


def test_more_ranks_than_heads(model: ModelConfig) -> None:
    fit.check_worker(worker(tp=6), model)
    with pytest.raises(ConfigError, match=r"^tp: 7: must be at most the model's 6 query heads") as caught:
        fit.check_worker(worker(tp=7), model)
    assert caught.value.key == "tp"


def test_a_pool_without_a_block(model: ModelConfig) -> None:
    # With two TP ranks each has one of the two KV heads: half of the bytes.
    block_bytes = 2 * 3 * 2 * 8 * 4 * 16
    fit.check_worker(worker(kv_cache_bytes=block_bytes), model)
    fit.check_worker(worker(kv_cache_bytes=block_bytes // 2, tp=2), model)
    with pytest.raises(ConfigError, match=f"must hold one block of {block_bytes} bytes"):
        fit.check_worker(worker(kv_cache_bytes=block_bytes - 1), model)


def test_host_memory_holds_whole_blocks_or_none(model: ModelConfig) -> None:
    block_bytes = 2 * 3 * 2 * 8 * 4 * 16
    layout = fit.kv_layout(worker(), model)
    assert fit.num_host_blocks(worker(offload_bytes=3 * block_bytes + 1), layout) == 3
    assert fit.num_host_blocks(worker(offload_bytes=0), layout) == 0
    assert fit.num_host_blocks(worker(preemption="recompute"), layout) == 0
    assert fit.num_host_blocks(worker(role="prefill"), layout) == 0
    with pytest.raises(ConfigError, match=rf"^offload_bytes: 7: must hold one block of {block_bytes} bytes, or be 0"):
        fit.check_worker(worker(offload_bytes=7), model)
    with pytest.raises(
        msgspec.ValidationError, match=r"^preemption: 'offload': needs host memory: give offload above 0"
    ):
        worker(preemption="offload", offload_bytes=0)


def test_a_context_that_the_pool_does_not_hold(model: ModelConfig) -> None:
    pool = 10 * 2 * 3 * 2 * 8 * 4 * 16
    model = msgspec.structs.replace(model, max_context=32768)
    fit.check_worker(worker(kv_cache_bytes=pool, max_context=160), model)
    fit.check_worker(worker(kv_cache_bytes=pool, max_context=640, cp=4), model)
    with pytest.raises(ConfigError) as caught:
        fit.check_worker(worker(kv_cache_bytes=pool, max_context=32768, cp=2), model)
    assert str(caught.value) == (
        "max_context: 32768: does not fit the KV pool: 10 blocks of 16 tokens on each of 2 CP ranks hold 320; "
        "raise kv_cache to 6 MiB, or cp to 205, or lower it"
    )


def test_a_context_that_the_model_does_not_reach(model: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    pool = 10 * 2 * 3 * 2 * 8 * 4 * 16
    fit.check_worker(worker(kv_cache_bytes=pool, max_context=128), model)
    assert not caplog.records
    fit.check_worker(worker(kv_cache_bytes=pool, max_context=512), model)
    assert caplog.messages == [
        "max_context: 512 is more than the model's context of 128 tokens, which is what decode-0 serves"
    ]


def test_more_ranks_than_devices(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    fit.check_worker(worker(tp=2, cp=2, device="cuda"), model)
    assert [fit.rank_config(worker(tp=2, device="cuda:1"), rank).device for rank in range(2)] == ["cuda:1", "cuda:2"]
    with pytest.raises(ConfigError, match=r"tp x cp: '2 x 2': needs 4 devices from cuda:1 on, but 4 are visible"):
        fit.check_worker(worker(tp=2, cp=2, device="cuda:1"), model)
    with pytest.raises(ConfigError, match="threads of one process compute on the cpu"):
        fit.check_worker(worker(tp=2, device="cuda", rank_processes=False), model)


def test_more_memory_than_there_is(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [
        worker(tp=2, cp=2, kv_cache_bytes=100 * MIB, offload_bytes=50 * MIB),
        worker(role="prefill", name="prefill-0", kv_cache_bytes=300 * MIB, offload_bytes=50 * MIB),
    ]
    needed = (
        4 * (weight_bytes(model, "float32", 2) + 150 * MIB + fit.PROCESS_BYTES)
        + weight_bytes(model, "float32")
        + 300 * MIB
        + fit.PROCESS_BYTES
    )
    monkeypatch.setattr(fit, "available_bytes", lambda device: needed)
    fit.check_memory(workers, model, {})
    monkeypatch.setattr(fit, "available_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError) as caught:
        fit.check_memory(workers, model, {})
    assert str(caught.value) == (
        "memory: '1,701 MiB': would be needed on cpu, but 1,701 MiB are free: "
        "decode-0 4 x (weights 1 MiB + KV 100 MiB + offloaded KV 50 MiB + process 160 MiB), "
        "prefill-0 1 x (weights 1 MiB + KV 300 MiB + process 160 MiB); "
        "lower kv_cache or offload, or the number of ranks or workers"
    )


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder: Path = tmp_path_factory.mktemp("sparse")
    build("qwen2-moe-mixed").save_pretrained(folder)  # 6 experts of 14 features, a shared one of 22, a dense FFN of 40
    return resolve_model(str(folder)).config()


def ffn_workers(count: int, **options: object) -> list[WorkerConfig]:
    return [worker(role="ffn", name=f"ffn-{number}", **options) for number in range(count)]


def test_ffn_workers_are_cut_by_their_experts_and_attention_workers_by_heads(
    model: ModelConfig, sparse: ModelConfig
) -> None:
    fit.check_worker(worker(role="ffn", name="ffn-0", tp=14, kv_cache_bytes=1), sparse)
    with pytest.raises(ConfigError, match=r"^tp: 15: must be at most the model's 14 FFN features"):
        fit.check_worker(worker(role="ffn", name="ffn-0", tp=15), sparse)
    with pytest.raises(ConfigError, match=r"^tp: 41: must be at most the model's 40 FFN features"):
        fit.check_worker(worker(role="ffn", name="ffn-0", tp=41), model)
    fit.check_worker(worker(role="attn", name="attn-0", tp=6), sparse)
    with pytest.raises(ConfigError, match=r"^tp: 7: must be at most the model's 6 query heads"):
        fit.check_worker(worker(role="attn", name="attn-0", tp=7), sparse)


def test_attention_workers_need_no_ffn_and_ffn_workers_their_share(
    sparse: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = worker(role="attn", name="attn-0", kv_cache_bytes=100 * MIB, offload_bytes=50 * MIB)
    nodes = ffn_workers(2)
    shares = ffn_shares([attn, *nodes], sparse, 1)
    experts = sum(num_experts(sparse, layer) * expert_bytes(sparse, "float32", layer) for layer in range(3))
    assert sum(shares.values()) == experts
    needed = attention_bytes(sparse, "float32", 1, 0, shared_experts=True) + experts
    needed += 150 * MIB + 3 * fit.PROCESS_BYTES
    monkeypatch.setattr(fit, "available_bytes", lambda device: needed)
    fit.check_memory([attn, *nodes], sparse, shares)
    monkeypatch.setattr(fit, "available_bytes", lambda device: needed - 1)
    with pytest.raises(
        ConfigError, match=r"attn-0 1 x \(weights .* \+ KV 100 .*, ffn-0 1 x \(weights 1 MiB \+ process"
    ):
        fit.check_memory([attn, *nodes], sparse, shares)


def test_capacity_for_all_experts(sparse: ModelConfig) -> None:
    experts = sum(num_experts(sparse, layer) * expert_bytes(sparse, "float32", layer) for layer in range(3))
    assert ffn_shares(ffn_workers(3, capacity_bytes=experts), sparse, 0) == dict.fromkeys(
        ("ffn-0", "ffn-1", "ffn-2"), experts
    )
    assert ffn_shares([worker()], sparse, 1) == {}
    with pytest.raises(ConfigError) as caught:
        ffn_shares(ffn_workers(3, capacity_bytes=experts // 2), sparse, 2)
    assert caught.value.key == "capacity_bytes"
    assert caught.value.value == experts // 2
    assert caught.value.remedy == (
        f"3 ffn workers hold {experts // 2 * 3} bytes; all experts, 2 times, take {2 * experts}: "
        f"raise it to at least {-(-2 * experts // 3)}, or workers to {-(-2 * experts // (experts // 2))}"
    )


def test_memory_that_is_free_is_positive_and_less_than_all() -> None:
    assert 0 < fit.available_bytes("cpu") < 1 << 50


def test_each_rank_has_its_share_of_cores() -> None:
    config = worker(tp=2, cores=(4, 5, 6, 7, 8))
    assert [(c.cores, c.threads) for c in (fit.rank_config(config, 0), fit.rank_config(config, 1))] == [
        ((4, 5), 2),
        ((6, 7), 2),
    ]
    # Too few to deal out: all ranks share them, and say how many threads themselves where they know better.
    crowded = worker(tp=2, cp=2, cores=(4, 5))
    assert [(c.cores, c.threads) for c in (fit.rank_config(crowded, 0), fit.rank_config(crowded, 3))] == [
        ((4, 5), 1),
        ((4, 5), 1),
    ]
    assert fit.rank_config(worker(tp=2, cores=(4, 5), threads=3), 1).threads == 3


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100, 32_768])
@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_a_context_takes_one_cp_th_of_the_blocks_on_each_rank(model: ModelConfig, cp: int, num_tokens: int) -> None:
    alone, layout = (fit.kv_layout(worker(cp=degree), model) for degree in (1, cp))
    caches = [
        KvCacheManager(num_blocks=4096, block_size=one.block_size * one.cp, prefix_cache=False)
        for one in (alone, layout)
    ]
    whole, share = (len(cache.admit(("a", 0), range(num_tokens), num_tokens).block_ids) for cache in caches)
    assert fit.block_bytes(layout) == fit.block_bytes(alone)
    assert whole == -(-num_tokens // alone.block_size)
    assert share == -(-whole // cp)
    # Nor does any rank hold a block's tokens more than another.
    held = [sum(map(len, tokens_of(layout, rank, range(num_tokens)))) for rank in range(cp)]
    assert sum(held) == num_tokens
    assert max(held) - min(held) <= layout.block_size
    assert max(held) <= share * layout.block_size
