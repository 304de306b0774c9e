"""Streams that must not notice that workers are killed and stopped under them.

Streams of four kinds (greedy; seeded with penalties; with a stop string; with log-probabilities) run over several
prefill and decode workers, over TCP and UCX, and then over attention and FFN workers, while seeded faults befall the
workers. Every answer must equal the undisturbed one, no call may end with an error, and everything must be back in
the end.

    python -m benchmarks.chaos [--quick] [--seed S] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil

from anabranch.config.options import KvTransport
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch_client import Admin, Client
from benchmarks.chaos.faults import Faults
from benchmarks.chaos.streams import Streams, Tally
from benchmarks.report import Figure, option_parser, report
from benchmarks.tiny_model import VOCAB, save_tiny_model
from launch.cluster import LocalCluster
from transport.planes import usable_planes

MAX_TOKENS = 100
SETTLE_TIMEOUT_S = 60.0
# p99 of what a client waits for, after a worker was silent for worker_timeout_s; after a kill it is less.
MAX_STALL_S = 6.0


def main() -> int:
    parser = option_parser("chaos", __doc__)
    parser.add_argument("--seed", type=int, default=1, help="of prompts and faults")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        model, vocab_size = ("smollm2-135m", 40_000)
        if options.quick:
            model, vocab_size = str(save_tiny_model(Path(folder))), VOCAB
        shapes = {"tcp": _split(model, "tcp")}
        if not options.quick:
            if "ucx" in usable_planes():
                shapes["ucx"] = _split(model, "ucx")
            shapes["afd"] = _apart(model)
        for name, topology in shapes.items():
            figures += run(
                name,
                topology,
                num_streams=8 if options.quick else 16,
                num_faults=10 if options.quick else 40,
                vocab_size=vocab_size,
                seed=options.seed,
            )
    return report("chaos", figures, options.json)


def _pool(num_workers: int) -> PoolConfig:
    return PoolConfig(workers=num_workers, threads=1, kv_cache_bytes=32 << 20)


def _split(model: str, transport: KvTransport) -> Topology:
    pools = Pools(prefill=_pool(2), decode=_pool(3))
    return Topology(model=model, dtype="float32", kv_transport=transport, pools=pools)


def _apart(model: str) -> Topology:
    attn = AttnPoolConfig(workers=2, threads=1, kv_cache_bytes=32 << 20)
    pools = Pools(prefill=_pool(2), attn=attn, ffn=FfnPoolConfig(workers=2, threads=1, replicas=0))
    return Topology(model=model, dtype="float32", pools=pools)


def run(
    name: str,
    topology: Topology,
    *,
    num_streams: int,
    num_faults: int,
    vocab_size: int,
    seed: int,
) -> list[Figure]:
    """Figures of one topology."""
    with (
        LocalCluster(topology) as cluster,
        Client(cluster.endpoint) as client,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        streams = Streams(client, num_streams, vocab_size=vocab_size, max_tokens=MAX_TOKENS, seed=seed)
        streams.learn()
        orchestrator = psutil.Process(cluster.process("orchestrator").pid)
        before = orchestrator.num_fds(), orchestrator.num_threads()
        faults = Faults(cluster, admin, seed)
        streams.start()
        try:
            for _ in range(num_faults):
                faults.play()
        finally:
            streams.stop()
        left = _settle(admin)
        after = orchestrator.num_fds(), orchestrator.num_threads()
        num_gone = len([gone for gone in admin.cluster().departures if not gone.expected])
        return [
            *_figures(name, streams.tally),
            Figure(key=f"{name}.faults", value=sum(faults.counts.values()), unit="faults"),
            # More would be workers that others' faults took with them, or that a short stop was taken for a death of.
            _most(f"{name}.deaths.unasked", num_gone - faults.num_deaths, "workers", 0),
            _most(f"{name}.left", left, "blocks, leases", 0),
            Figure(
                key=f"{name}.descriptors", value=after[0] - before[0], unit="more", target=0, higher_is_better=False
            ),
            Figure(key=f"{name}.threads", value=after[1] - before[1], unit="more", target=4, higher_is_better=False),
        ]


def _settle(admin: Admin) -> int:
    """Blocks, leases and requests that are left once all answers have ended and there was time to give them back."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        cluster = admin.cluster()
        left = cluster.num_requests + sum(
            worker.num_total_blocks - worker.num_free_blocks + worker.num_leases for worker in cluster.workers
        )
        if left == 0 or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _figures(name: str, tally: Tally) -> list[Figure]:
    for line in (*tally.wrong, *tally.errors):
        print(f"{name}: {line}")
    stalls_s = sorted(tally.stalls_s) or [0.0]
    recoveries_s = sorted(tally.recoveries_s) or [0.0]
    return [
        Figure(key=f"{name}.answers.right", value=tally.num_right, unit="answers", target=1),
        _most(f"{name}.answers.wrong", len(tally.wrong), "answers", 0),
        _most(f"{name}.errors", len(tally.errors), "calls", 0),
        Figure(key=f"{name}.recoveries", value=tally.num_recoveries, unit="times", target=1),
        Figure(key=f"{name}.recovery.p50", value=recoveries_s[len(recoveries_s) // 2], unit="s"),
        Figure(key=f"{name}.recovery.max", value=recoveries_s[-1], unit="s"),
        Figure(key=f"{name}.stall.p50", value=stalls_s[len(stalls_s) // 2], unit="s"),
        _most(f"{name}.stall.p99", stalls_s[(len(stalls_s) * 99) // 100], "s", MAX_STALL_S),
        Figure(key=f"{name}.stall.max", value=stalls_s[-1], unit="s"),
    ]


def _most(key: str, value: float, unit: str, target: float) -> Figure:
    return Figure(key=key, value=value, unit=unit, target=target, higher_is_better=False)


if __name__ == "__main__":
    raise SystemExit(main())
