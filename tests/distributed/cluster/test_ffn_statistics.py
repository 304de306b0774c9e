"""What the rows between attention and FFN workers cost is counted, reported and shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.model.size import expert_bytes, num_experts
from anabranch.model.sources import resolve_model
from anabranch_client import Admin, Client, Cluster, Sampling, Worker
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.known import Known

pytestmark = pytest.mark.distributed

NUM_TOKENS = 9


def of(cluster: Cluster, role: str) -> Worker:
    return next(worker for worker in cluster.workers if worker.role == role)


def test_calls_rows_and_times_add_up(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    known = Known("qwen2-moe-mixed", tmp_path_factory.mktemp("mixture"), 640)
    model = resolve_model(str(known.folder)).config()
    with (
        InProcessCluster(tmp_path, known.folder, ("prefill", "attn", "ffn"), heartbeat_s=0.05) as cluster,
        Client(cluster.endpoint) as client,
        Admin(cluster.endpoint, token_file=cluster.orchestrator.admin_token_file) as admin,
    ):
        answer = client.complete((1, 2, 3, 4, 5), Sampling(max_tokens=NUM_TOKENS, ignore_eos=True))
        # Prefill gives the first token; each other one is a step of one row, which all layers are asked about.
        num_calls = (NUM_TOKENS - 1) * model.num_layers
        times = answer.ffn
        assert times is not None
        assert (times.num_answers, times.num_merged_rows, times.rows_per_product) == (num_calls, num_calls, 1.0)
        assert min(times.queue_s, times.compute_s, times.way_s) > 0.0
        assert answer.timings is not None
        assert times.queue_s + times.compute_s + times.way_s < answer.timings.e2e_s

        def reported() -> bool:
            load, traffic = of(admin.cluster(), "ffn").ffn_load, of(admin.cluster(), "attn").ffn_traffic
            # Warming up sends rows too, before any FFN worker is known.
            return load is not None and traffic is not None and load.num_products >= num_calls <= traffic.num_calls

        wait_until(reported, "beats")
        load, traffic = of(admin.cluster(), "ffn").ffn_load, of(admin.cluster(), "attn").ffn_traffic
        assert load is not None
        assert traffic is not None
        assert (traffic.num_calls, traffic.num_rows, traffic.num_answers) == (num_calls,) * 3
        assert (traffic.num_retries, traffic.num_second) == (0, 0)
        assert (load.num_products, load.num_rows, load.rows_per_product) == (num_calls, num_calls, 1.0)
        assert traffic.rows_per_product == 1.0
        assert traffic.mean_queue_s == pytest.approx(times.queue_s / num_calls)
        assert traffic.mean_compute_s == pytest.approx(times.compute_s / num_calls)
        assert 0.0 < traffic.waited_share < 1.0
        assert 0.0 < load.busy_share < 1.0
        assert load.bytes == sum(
            num_experts(model, layer) * expert_bytes(model, "float32", layer) for layer in range(model.num_layers)
        )
        # Others have none of this.
        prefill = of(admin.cluster(), "prefill")
        assert (prefill.ffn_load, prefill.ffn_traffic) == (None, None)


def test_without_ffn_workers_nothing_is_said(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    known = Known("llama-gqa-tied", tmp_path_factory.mktemp("dense"), 640)
    with InProcessCluster(tmp_path, known.folder, ("prefill", "decode")) as cluster, Client(cluster.endpoint) as client:
        assert client.complete((1, 2, 3), Sampling(max_tokens=3, ignore_eos=True)).ffn is None
