"""`python -m benchmarks.afd_side JSON`: one side of `benchmarks.afd` as a process, asked by JSON lines.

role ffn       holds every FFN half and serves; answers what it did since it was asked last
role attn      attention halves and lanes; runs decode steps against FFN sides, or against none (instant answers)
role whole     whole layers in one process, as a decode worker has them
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.device import pin_process, resolve_device, resolve_dtype
from anabranch.engine.pending import PendingResult
from anabranch.kernels.native import select_kernels
from anabranch.model.load import load_expert_table
from anabranch.model.size import attention_bytes, ffn_bytes, num_experts
from anabranch.parallel.group import SingleRank
from anabranch.protocol.ffn import FfnNode, FfnPlacement
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan
from attn_nodes.lanes import Lanes
from attn_nodes.remote_ffn import RemoteFfn
from ffn_nodes.experts import NodeExperts
from ffn_nodes.serving import Serving
from transport.m2n import ChannelShape, Combine, create_link_maker, create_listener

MAX_ROWS = 128
STOP_TIMEOUT_S = 10.0


class FfnSide:
    """Every FFN half of a model, served."""

    def __init__(self, model: str, dtype: str, merge_wait_us: int) -> None:
        device = resolve_device("cpu")
        resolved = resolve_dtype(dtype, device)  # type: ignore[arg-type]
        kernels = select_kernels(device, resolved)
        config, table = load_expert_table(model, dtype=resolved, device=device, products=kernels, group=SingleRank())
        holding = tuple(tuple(range(num_experts(config, layer))) for layer in range(config.num_layers))
        with table.reading() as loader:
            for layer, experts in enumerate(holding):
                table.load(loader, layer, experts)
        shape = ChannelShape(
            model=model,
            dtype=resolved,
            hidden_size=config.hidden_size,
            max_rows=1,
            max_choices=1 if config.moe is None else config.moe.top_k,
            num_slots=1,
        )
        listener = create_listener(shape, "auto")
        self.addresses = listener.addresses
        self.holding = holding
        self.bytes = table.num_bytes
        self._serving = Serving(
            listener, NodeExperts(table), num_threads=1, merge_wait_s=merge_wait_us / 1e6, on_failure=_fail
        )
        self._serving.start()
        self._before = (0, 0.0)

    def asked(self, question: dict[str, Any]) -> dict[str, Any]:
        now = (self._serving.activity.num_done, time.process_time())
        num_products, cpu_s = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return {"num_products": num_products, "cpu_s": cpu_s}

    def close(self) -> None:
        self._serving.stop(STOP_TIMEOUT_S)


class DecodeSide:
    """Attention halves, or whole layers, and decode steps of any batch and context.

    Args:
        kv_bytes: of the pool, which is filled with small random values.
    """

    def __init__(self, role: str, model: str, dtype: str, threads: int, kv_bytes: int) -> None:
        config = WorkerConfig(
            role="attn" if role == "attn" else "decode",
            name="benchmark",
            orchestrator="ipc://none",
            model=model,
            dtype=dtype,  # type: ignore[arg-type]
            threads=threads,
            kv_cache_bytes=kv_bytes,
            offload_bytes=0,
            max_running=MAX_ROWS,
            preemption="recompute",
        )
        self._config = config
        self.engine: Engine = build_engine(config)
        self.engine.kv.data.normal_(0.0, 0.1)
        self._ffn: RemoteFfn | None = None
        self._lanes: Lanes | None = None

    def asked(self, question: dict[str, Any]) -> dict[str, Any]:
        if "nodes" in question:
            self._connect(question["nodes"], question["transport"], question["lanes"])
            return {}
        plans = self._plans(question["batch"], question["context"], question["lanes"])
        how = question["how"]
        run = {"remote": self._run_remote, "instant": self._run_instant, "whole": self._run_whole}[how]
        run(plans, 2)
        cpu_s, start_s = time.process_time(), time.perf_counter()
        traffic = None if self._ffn is None else dict(vars(self._ffn.traffic))
        waited_s = run(plans, question["steps"])
        found: dict[str, Any] = {
            "wall_s": time.perf_counter() - start_s,
            "cpu_s": time.process_time() - cpu_s,
            "waited_s": waited_s,
        }
        if traffic is not None and self._ffn is not None:
            found |= {key: value - traffic[key] for key, value in vars(self._ffn.traffic).items()}
        return found

    def _connect(self, nodes: list[dict[str, Any]], transport: str, num_lanes: int) -> None:
        self.close()
        shape = ChannelShape(
            model=self._config.model,
            dtype=self.engine.kv.data.dtype,
            hidden_size=self.engine.model_config.hidden_size,
            max_rows=MAX_ROWS,
            max_choices=1 if self.engine.model_config.moe is None else self.engine.model_config.moe.top_k,
            num_slots=2 * num_lanes + 2,
        )
        self._ffn = RemoteFfn(
            create_link_maker(shape, transport), combine=Combine.SUMS, ffn_timeout_s=20.0, ffn_unavailable_s=60.0
        )
        self._lanes = Lanes(self.engine.runner, self._ffn, SingleRank(), num_lanes)
        self._lanes.use(
            FfnPlacement(
                version=1,
                nodes=tuple(
                    FfnNode(
                        name=f"ffn-{index}",
                        incarnation=index,
                        addresses=node["addresses"],
                        holding=tuple(map(tuple, node["holding"])),
                    )
                    for index, node in enumerate(nodes)
                ),
            )
        )

    def _plans(self, batch: int, context: int, num_lanes: int) -> list[StepPlan]:
        """A step of each lane: one new token of each of its sequences, all of one context."""
        size = self.engine.kv.block_size
        per_sequence = -(-(context + 1) // size)
        assert batch * per_sequence <= self.engine.kv.num_blocks, "the pool is too small"
        sequences = [
            SequencePlan(
                request_id=str(index),
                epoch=0,
                token_ids=(index + 1,),
                start=context,
                block_ids=tuple(range(index * per_sequence, (index + 1) * per_sequence)),
                sample=SampleSpec(params=SamplingParams(), index=0),
            )
            for index in range(batch)
        ]
        dealt = [sequences[lane::num_lanes] for lane in range(num_lanes)]
        return [StepPlan(step=1, sequences=tuple(part), lane=lane) for lane, part in enumerate(dealt) if part]

    def _run_remote(self, plans: list[StepPlan], num_steps: int) -> float:
        """So many steps of each lane, each begun when the lane's last one has ended; seconds spent waiting."""
        assert self._lanes is not None
        assert self._ffn is not None
        lanes, ffn = self._lanes, self._ffn
        left = {plan.lane: num_steps for plan in plans}
        waited_s = 0.0
        wait = ffn.wait

        def timed(timeout_s: float) -> None:
            nonlocal waited_s
            start_s = time.perf_counter()
            wait(timeout_s)
            waited_s += time.perf_counter() - start_s

        def ended(plan: StepPlan) -> Callable[[PendingResult | Exception], None]:
            def done(result: PendingResult | Exception) -> None:
                if isinstance(result, Exception):
                    raise result
                left[plan.lane] -= 1
                if left[plan.lane]:
                    lanes.begin(plan, done)

            return done

        ffn.wait = timed  # type: ignore[method-assign]
        for plan in plans:
            lanes.begin(plan, ended(plan))
        while lanes.busy:
            lanes.advance()
        ffn.wait = wait  # type: ignore[method-assign]
        return waited_s

    @torch.inference_mode()
    def _run_instant(self, plans: list[StepPlan], num_steps: int) -> float:
        """Attention alone: every FFN half answers its own rows at once."""
        for _ in range(num_steps):
            for plan in plans:
                calls = self.engine.runner.steps(plan)
                call = next(calls)
                try:
                    while True:
                        call = calls.send(call.rows.normed_TC)
                except StopIteration:
                    pass
        return 0.0

    def _run_whole(self, plans: list[StepPlan], num_steps: int) -> float:
        for _ in range(num_steps):
            for plan in plans:
                self.engine.runner.execute(plan)
        return 0.0

    def close(self) -> None:
        if self._ffn is not None:
            self._ffn.close()
            self._ffn = None


def _fail(error: Exception) -> None:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    options = json.loads(sys.argv[1])
    pin_process(tuple(options["cores"]), options["threads"])
    side: FfnSide | DecodeSide
    if options["role"] == "ffn":
        side = FfnSide(options["model"], options["dtype"], options["merge_wait_us"])
        ready: dict[str, Any] = {"addresses": side.addresses, "holding": side.holding, "bytes": side.bytes}
    else:
        side = DecodeSide(options["role"], options["model"], options["dtype"], options["threads"], options["kv_bytes"])
        config = side.engine.model_config
        count = attention_bytes(config, options["dtype"], 1, 0)
        if options["role"] == "whole":
            count += ffn_bytes(config, options["dtype"], 1, 0)
        kv = side.engine.kv
        ready = {
            "num_layers": config.num_layers,
            "bytes": count,
            "kv_bytes_per_token": kv.num_bytes // (kv.num_blocks * kv.block_size),
        }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(side.asked(json.loads(line))), flush=True)
    side.close()


if __name__ == "__main__":
    main()
