"""Lanes are measured where their number is chosen by it, on the first rank, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import build_engine
from anabranch.schedule.lane_costs import LaneCosts
from attn_nodes.lane_meter import MEASURED_STEPS, LaneMeter
from attn_nodes.rank import AttnRank
from runtime.generation.commands import GenerationEvent
from tests.support.families import save

pytestmark = pytest.mark.unit


def test_it_says_now_and_then_what_steps_take() -> None:
    told: list[LaneCosts] = []
    meter = LaneMeter(told.append)
    for _ in range(2 * MEASURED_STEPS - 1):
        meter.ended(8, attention_s=0.004, ffn_s=0.002, ways_s=[0.0005, 0.0001])
    (costs,) = told
    assert costs.attention.at(8) == pytest.approx(0.004)
    assert costs.ffn.at(8) == pytest.approx(0.002)
    assert costs.way_s == pytest.approx(0.0002)


def test_a_fixed_number_is_not_measured(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save("llama-gqa-tied", tmp_path / "model")
    events: list[GenerationEvent] = []
    for lanes, measured in ((0, True), (2, False)):
        config = WorkerConfig(
            role="attn",
            name="attn-0",
            orchestrator="",
            model=str(folder),
            dtype="float32",
            lanes=lanes,
            kv_cache_bytes=1 << 20,
            kv_transport="inproc",
        )
        rank = AttnRank(config, build_engine(config), events.append)
        try:
            assert (rank._lanes._meter is not None) is measured
        finally:
            rank.close()
