"""What an engine computes before its first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.engine.build import Engine
from anabranch.engine.warm_up import warm_up_plans

pytestmark = pytest.mark.unit


def engine(device: str, num_blocks: int, max_context: int) -> Engine:
    fake = SimpleNamespace(
        cache=KvCacheManager(num_blocks=num_blocks, block_size=16),
        max_context=max_context,
        runner=SimpleNamespace(device=torch.device(device)),
    )
    return cast(Engine, fake)


@pytest.mark.parametrize(("num_blocks", "max_context"), [(1, 16), (1, 1), (3, 48), (400, 4000), (400, 90)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_plan_fits_the_pool_and_the_context(device: str, num_blocks: int, max_context: int) -> None:
    for role in ("prefill", "decode", "colocated"):
        for plan in warm_up_plans(engine(device, num_blocks, max_context), role):
            for sequence in plan.sequences:
                assert sequence.num_new_tokens >= 1
                assert max(sequence.block_ids) < num_blocks
                assert sequence.start + sequence.num_new_tokens <= min(max_context, 16 * len(sequence.block_ids))


def test_a_gpu_computes_a_step_of_each_kind() -> None:
    small, large = (engine(device, 400, 4000) for device in ("cpu", "cuda"))
    assert [len(warm_up_plans(small, role)) for role in ("prefill", "decode", "colocated")] == [1, 1, 2]
    decodes = warm_up_plans(large, "decode")
    assert [len(plan.sequences) for plan in decodes] == [1, 1, 3, 1, 5]
    assert {s.num_new_tokens for plan in decodes for s in plan.sequences} == {1}
    assert max(s.start for plan in decodes for s in plan.sequences) == 899
    assert min(s.num_new_tokens for plan in warm_up_plans(large, "prefill") for s in plan.sequences) > 1
