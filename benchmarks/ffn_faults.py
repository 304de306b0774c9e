"""FFN nodes that are killed, stopped, lied for, added and taken away under 50 streams: tokens, and how long they stall.

A tiny mixture of experts in float32 on 2 FFN nodes that both hold every expert. Each fault strikes once all streams
have some tokens; every stream is compared with its undisturbed tokens. A stall is a gap between two tokens of one
stream that ends after the fault; beside it stands the longest gap of the undisturbed streams of the same run, which is
what the machine itself does. With `--scale`, only growth and shrinkage: inter-token latency beside that of the same
streams in peace.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, RestartConfig, Topology
from anabranch.system.child_process import python_module
from anabranch_client import Admin, AsyncClient
from benchmarks.load import Answer, ask, quantile
from benchmarks.report import Figure, Options, option_parser, parse_options, report
from benchmarks.spoilt_ffn import SPOILT
from benchmarks.tiny_model import CONTEXT, VOCAB, save_tiny_mixture
from launch.cluster import LocalCluster
from launch.process_plan import plan_ffn_worker

NUM_STREAMS = 50
FFN_TIMEOUT_S = 1.0
# What a stall may be beyond the time after which a node is given up.
STALL_S = 0.5
LATENCY_RATIO = 2.0
WAIT_S = 120.0
PROMPTS = [
    [(7 * stream + 3 * place) % (VOCAB - 3) + 3 for place in range(8 + stream % 9)] for stream in range(NUM_STREAMS)
]
SPOILT_INDEX = 9


def topology(model: Path, num_attn: int, num_ffn: int, replicas: int) -> Topology:
    small = {"threads": 1, "kv_cache_bytes": 32 << 20, "offload_bytes": 0, "preemption": "recompute"}
    return Topology(
        model=str(model),
        dtype="float32",
        prefix_cache=False,
        ffn_timeout_s=FFN_TIMEOUT_S,
        restart=RestartConfig(policy="never"),  # the benchmark starts them again when it is ready
        pools=Pools(
            prefill=PoolConfig(**small),  # type: ignore[arg-type]
            attn=AttnPoolConfig(workers=num_attn, lanes=2, **small),  # type: ignore[arg-type]
            ffn=FfnPoolConfig(workers=num_ffn, threads=1, replicas=replicas, rebalance_s=0),
        ),
    )


@dataclass
class Streams:
    """What came of all streams.

    Attributes:
        errors: of those that did not end as they should, an error's code, or that they differ.
        struck_s: `time.perf_counter()` of the fault.
    """

    answers: list[Answer]
    errors: list[str]
    struck_s: float

    @property
    def longest_stall_s(self) -> float:
        stop_s = time.perf_counter()
        return max(
            (gap for answer in self.answers for gap in answer.gaps_between_s(self.struck_s, stop_s)), default=0.0
        )

    def gaps_s(self) -> list[float]:
        return [gap for answer in self.answers for gap in answer.gaps_s]


class Bench:
    """Streams against one cluster."""

    def __init__(self, cluster: LocalCluster, num_tokens: int) -> None:
        self.cluster = cluster
        self.admin = Admin(cluster.endpoint, token_file=cluster.admin_token_file)
        self.num_tokens = num_tokens
        self.expected: list[list[int]] = []

    async def run(self, strike: Callable[[], Awaitable[None]] | None = None) -> Streams:
        """All streams, with a fault (or none) once all have tokens; the first run gives the tokens to compare with."""
        async with AsyncClient(self.cluster.endpoint, timeout_s=WAIT_S) as client:
            answers = [Answer(sent_s=time.perf_counter()) for _ in PROMPTS]
            running = [
                asyncio.create_task(ask(client, prompt, self.num_tokens, answer))
                for prompt, answer in zip(PROMPTS, answers, strict=True)
            ]
            await until(
                "tokens of all streams",
                lambda: all(len(a.token_s) > 5 or t.done() for a, t in zip(answers, running, strict=True)),
            )
            struck_s = time.perf_counter()
            if strike is not None:
                await strike()
            ends = await asyncio.gather(*running, return_exceptions=True)
        found = [answer.token_ids for answer in answers]
        self.expected = self.expected or found
        errors = [
            str(getattr(end, "code", type(end).__name__)) if isinstance(end, BaseException) else "differs"
            for end, tokens, expected in zip(ends, found, self.expected, strict=True)
            if isinstance(end, BaseException) or tokens != expected
        ]
        return Streams(answers=answers, errors=errors, struck_s=struck_s)

    def ffn_workers(self) -> dict[str, int]:
        """FFN worker -> bytes that it holds."""
        return {w.name: w.ffn_load.bytes for w in self.admin.cluster().workers if w.ffn_load is not None}

    async def until_ffn(self, num_workers: int, whole_bytes: int) -> None:
        """Wait for so many FFN workers that together hold so much."""
        await until(
            f"{num_workers} FFN workers with {whole_bytes} bytes",
            lambda: len(held := self.ffn_workers()) == num_workers and sum(held.values()) == whole_bytes,
            self.ffn_workers,
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.cluster.process(name).pid, number)

    def holdings(self, name: str) -> tuple[int, int]:
        """Descriptors and mappings of a process."""
        process = psutil.Process(self.cluster.process(name).pid)
        return process.num_fds(), len(process.memory_maps(grouped=False))


async def until(what: str, condition: Callable[[], bool], describe: Callable[[], object] = str) -> None:
    """Wait for a condition. Raises TimeoutError."""
    deadline_s = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {WAIT_S:g} s for {what}: {describe()}")
        await asyncio.sleep(0.02)


async def faults(cluster: LocalCluster, num_tokens: int) -> list[Figure]:
    bench = Bench(cluster, num_tokens)
    await bench.run()
    [whole] = set(bench.ffn_workers().values())
    quiet = await bench.run()
    figures = [
        Figure(key="undisturbed_longest_gap", value=quiet.longest_stall_s, unit="s"),
        *_equal("undisturbed", quiet),
    ]

    def note(name: str, streams: Streams, bound_s: float) -> None:
        print(f"{name}: longest stall {streams.longest_stall_s:.3f} s", file=sys.stderr)
        figures.extend(_equal(name, streams))
        figures.append(
            Figure(
                key=f"{name}_longest_stall",
                value=streams.longest_stall_s,
                unit="s",
                target=bound_s,
                higher_is_better=False,
            )
        )

    async def restore() -> None:
        """Two FFN workers again, of which each holds everything."""
        await asyncio.to_thread(bench.admin.scale_ffn, 2)
        await bench.until_ffn(2, 2 * whole)

    async def kill() -> None:
        bench.kill("ffn-0")

    # Rows of both lanes are out nearly always: the attention node has nothing else to do.
    note("sigkill", await bench.run(kill), STALL_S)
    await restore()

    victim = cluster.ffn_workers()[-1]

    async def stop() -> None:
        bench.kill(victim, signal.SIGSTOP)

    note("sigstop", await bench.run(stop), FFN_TIMEOUT_S + STALL_S)
    await until(f"{victim} to be gone", lambda: victim not in bench.ffn_workers())

    async def wake() -> None:
        bench.kill(victim, signal.SIGCONT)

    note("sigcont_after_it_was_replaced", await bench.run(wake), STALL_S)
    await until(f"{victim} to end", lambda: not cluster.process(victim).alive)
    await restore()

    async def kill_while_experts_move() -> None:
        there = set(bench.ffn_workers())
        await asyncio.to_thread(bench.admin.scale_ffn, 3)
        asking = asyncio.create_task(_kill_once_another_came(bench, there))
        background.append(asking)

    background: list[asyncio.Task[None]] = []
    note("sigkill_while_experts_move", await bench.run(kill_while_experts_move), STALL_S)
    await asyncio.gather(*background)
    await bench.until_ffn(2, 2 * whole)
    figures.extend(await _spoilt(bench, whole, note))

    ffn = cluster.ffn_workers()[0]
    before, bytes_before = bench.holdings(ffn), bench.ffn_workers()

    async def kill_attention() -> None:
        bench.kill("attn-0")

    lost = await bench.run(kill_attention)
    print(f"attn_sigkill: {len(lost.errors)} streams ended ({', '.join(sorted(set(lost.errors)))})", file=sys.stderr)
    figures.append(Figure(key="attn_sigkill_ended", value=len(lost.errors), unit="streams"))
    figures.append(
        Figure(
            key="attn_sigkill_wrong_tokens",
            value=lost.errors.count("differs"),
            unit="streams",
            target=0,
            higher_is_better=False,
        )
    )
    await until(
        "its link to be gone", lambda: bench.holdings(ffn)[0] < before[0] and bench.holdings(ffn)[1] < before[1]
    )
    figures.append(
        Figure(
            key="attn_sigkill_ffn_bytes",
            value=sum(bench.ffn_workers().values()),
            unit="bytes",
            reference=sum(bytes_before.values()),
            reference_name="before",
            target=1.0,
            higher_is_better=False,
        )
    )
    return figures


async def _kill_once_another_came(bench: Bench, there: set[str]) -> None:
    await until("a third FFN worker", lambda: bool(bench.ffn_workers().keys() - there))
    bench.kill(min(there))


async def _spoilt(bench: Bench, whole: int, note: Callable[[str, Streams, float], None]) -> list[Figure]:
    """A third FFN worker behind a proxy that changes bytes; then it is told to end by a signal alone."""
    cluster = bench.cluster
    plan = plan_ffn_worker(
        cluster.topology,
        f"ipc://{cluster.folder}/control.sock",
        SPOILT_INDEX,
        secret_file=cluster.folder / "control.secret",
    )
    with tempfile.TemporaryFile("w+") as log:
        worker = await asyncio.create_subprocess_exec(
            *python_module("benchmarks.spoilt_ffn", *plan.arguments), stderr=log
        )
        try:
            await bench.until_ffn(3, 3 * whole)
            note("spoilt_bytes", await bench.run(), STALL_S)

            async def leave() -> None:
                worker.send_signal(signal.SIGTERM)

            note("sigterm_to_the_worker", await bench.run(leave), STALL_S)
            await until("it to end", lambda: worker.returncode is not None)
        finally:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()
        log.seek(0)
        num_spoilt = log.read().count(SPOILT)
    return [
        Figure(key="spoilt_bytes_number", value=num_spoilt, unit="bytes", target=1),
        Figure(key="sigterm_exit_status", value=abs(worker.returncode or 0), unit="", target=0, higher_is_better=False),
    ]


def _equal(name: str, streams: Streams) -> list[Figure]:
    for error in sorted(set(streams.errors)):
        print(f"{name}: {streams.errors.count(error)} streams: {error}", file=sys.stderr)
    equal = NUM_STREAMS - len(streams.errors)
    return [Figure(key=f"{name}_equal", value=equal, unit="streams", target=NUM_STREAMS)]


async def scale(cluster: LocalCluster, num_tokens: int) -> list[Figure]:
    """1 to 3 and back, each expert on one node."""
    bench = Bench(cluster, num_tokens)
    await bench.run()
    [whole] = bench.ffn_workers().values()
    steady = [gap for _ in range(2) for gap in (await bench.run()).gaps_s()]
    figures = []
    for workers, name in ((3, "growth"), (1, "shrinkage")):
        gaps_s: list[float] = []
        errors: list[str] = []
        await asyncio.to_thread(bench.admin.scale_ffn, workers)
        done = asyncio.create_task(bench.until_ffn(workers, whole))
        while True:
            last = done.done()
            streams = await bench.run()
            gaps_s += streams.gaps_s()
            errors += streams.errors
            if last:
                break
        await done
        figures += [
            Figure(key=f"{name}_not_equal", value=len(errors), unit="streams", target=0, higher_is_better=False),
            Figure(
                key=f"{name}_itl_p99",
                value=quantile(gaps_s, 0.99) * 1e3,
                unit="ms",
                reference=quantile(steady, 0.99) * 1e3,
                reference_name="in peace",
                target=LATENCY_RATIO,
                higher_is_better=False,
            ),
            Figure(key=f"{name}_longest_gap", value=max(gaps_s), unit="s"),
        ]
    return figures


def measure(options: Options, only_scale: bool) -> list[Figure]:
    num_tokens = 60 if options.quick else CONTEXT - 40
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_mixture(Path(folder))
        if not only_scale:
            with LocalCluster(topology(model, num_attn=2, num_ffn=2, replicas=0)) as cluster:
                figures += asyncio.run(faults(cluster, num_tokens))
        with LocalCluster(topology(model, num_attn=1, num_ffn=1, replicas=1)) as cluster:
            figures += asyncio.run(scale(cluster, num_tokens))
    return figures


def main() -> int:
    parser = option_parser("ffn_faults", __doc__)
    parser.add_argument("--scale", action="store_true", help="growth and shrinkage alone")
    only_scale = parser.parse_args().scale
    options = parse_options("ffn_faults", __doc__, parser)
    return report("ffn_faults", measure(options, only_scale), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
