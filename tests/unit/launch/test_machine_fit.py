"""A topology that does not fit the model is refused by the key of its file, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from anabranch.model.sources import ModelSource, resolve_model
from launch.machine_fit import check_fit
from tests.support.families import build

pytestmark = pytest.mark.unit

SMALL = {"kv_cache_bytes": 1 << 20, "offload_bytes": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder: Path = tmp_path_factory.mktemp("model")
    build("qwen2-moe-mixed").save_pretrained(folder)  # 6 heads; 2 x 6 experts of 14 features, a dense FFN of 40
    return resolve_model(str(folder))


def apart(ffn: FfnPoolConfig, attn: AttnPoolConfig | None = None) -> Topology:
    pools = Pools(prefill=PoolConfig(**SMALL), attn=attn or AttnPoolConfig(**SMALL), ffn=ffn)
    return Topology(dtype="float32", pools=pools)


def test_what_fits(source: ModelSource) -> None:
    check_fit(apart(FfnPoolConfig(workers=2, tp=14, capacity_bytes=1 << 20)), source)


@pytest.mark.parametrize(
    ("topology", "key", "says"),
    [
        (apart(FfnPoolConfig(tp=15)), "pools.ffn.tp", "at most the model's 14 FFN features"),
        (apart(FfnPoolConfig(), AttnPoolConfig(tp=7, **SMALL)), "pools.attn.tp", "at most the model's 6 query heads"),
        (
            apart(FfnPoolConfig(workers=2, capacity_bytes=50_000)),
            "pools.ffn.capacity",
            "all experts, 1 times, take 119808",
        ),
        (apart(FfnPoolConfig(workers=2, capacity_bytes=100_000, replicas=0)), "pools.ffn.capacity", "2 times"),
        (
            apart(FfnPoolConfig(), AttnPoolConfig(kv_cache_bytes=1, offload_bytes=0)),
            "pools.attn.kv_cache",
            "must hold one block",
        ),
    ],
)
def test_what_does_not(source: ModelSource, topology: Topology, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_fit(topology, source)
    assert caught.value.key == key


def test_workers_of_one_rank_check_themselves(source: ModelSource) -> None:
    check_fit(replace(apart(FfnPoolConfig()), pools=Pools(colocated=PoolConfig(kv_cache_bytes=1))), source)
