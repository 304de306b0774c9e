"""Options that a topology file gives and workers go by, each declared here and nowhere else.

A name, a default, bounds and unit (in the type), and the reason (in the docstring): `Topology` and `PoolConfig`, which
are read from the file, and `WorkerConfig`, which is read from flags, inherit them; help and tables are made from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from anabranch.config.bounds import Between, Count, Line, Options, Seconds, Size, SizeOrNone, Text, Tokens
from anabranch.errors import ConfigError
from anabranch.parallel.mesh import Mesh

DtypeName = Literal["float32", "bfloat16", "float16", "auto"]
KvTransport = Literal["auto", "inproc", "tcp", "ucx"]
Preemption = Literal["auto", "recompute", "offload"]
RingChoice = Literal["auto", "pass_kv", "pass_q"]
FfnTransport = Literal["auto", "shm", "tcp", "ucx"]
RowExact = Literal["auto", "on", "off"]
RestartPolicy = Literal["on_failure", "never"]
CombineChoice = Literal["auto", "slots", "sums"]
SharedExpert = Literal["attn", "ffn"]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """What all workers of a cluster have alike.

    Attributes:
        model: a known name (`anabranch models`), a Hugging Face folder or a GGUF file.
        dtype: of weights, activations and KV; auto: bfloat16 where the device is fast at it.
        device: cpu, cuda, cuda:0, ...
        kv_transport: tensor plane for KV: inproc (one process), tcp, ucx, or auto (the best that both ends have).
        block_size: tokens per KV block.
        prefix_cache: keep full blocks of finished requests for prompts that begin alike and have the same cache_salt.
        native_kernels: use compiled kernels where they can be had: C++ on cpu, FlexAttention on cuda; false:
            PyTorch operations.
        step_programs: record each decode step's kernel calls once per batch size and repeat them as one call, on attn
            workers as one for each layer and lane; same tokens, less time per token. Needs native kernels on cpu; with
            cp above 1 steps are not recorded.
        schedule_ahead: while the ranks compute a decode step, plan the next one and send it to them.
        max_context: most tokens of one request; 0: what the model and the pools allow. A model's context is its
            trained length, times the factor where linear or yarn scaling stretches it.
        collective_timeout_s: longest wait of a worker's ranks for each other; then the worker ends.
        step_stall_s: longest time that one step, or anything else that a worker's threads do in one piece, may take;
            then the worker ends.
        ffn_transport: what rows travel by between attention and FFN workers: shm (one host), tcp, ucx (needs the
            package ucxx; for networks with RDMA), or auto (shm within a host, tcp between hosts).
        row_exact: FFN products in blocks of a fixed number of rows, so that a row's bits depend neither on the rows
            beside it nor on the FFN worker; same tokens as without FFN workers need it. auto: on in float32.
        combine: what an FFN worker answers of a sparse layer: slots (a row for each choice, summed by the attention
            worker in the token's order, bit for bit as on one worker), sums (one partial sum in float32, fewer bytes),
            or auto (slots in float32).
        shared_expert: who has the expert that every token of a sparse layer passes, where a model has one: attn (each
            attention worker, which computes it while rows are at FFN workers), or ffn (FFN workers, as one more expert
            of the layer: less memory and less work for attention workers).
        ffn_timeout_s: silence of an FFN worker after which its rows go to another that holds the expert.
        ffn_unavailable_s: longest time that rows wait for some FFN worker that holds their expert; then their
            requests end with `ffn_unavailable`. With ffn_timeout_s it must be below collective_timeout_s where an attn
            worker has several ranks, which wait for each other meanwhile.
    """

    model: Line = "smollm2-135m"
    dtype: DtypeName = "auto"
    device: Annotated[str, Text(100)] = "cpu"
    kv_transport: KvTransport = "auto"
    block_size: Annotated[int, Between(1, 1 << 16, "tokens")] = 16
    prefix_cache: bool = True
    native_kernels: bool = True
    step_programs: bool = True
    schedule_ahead: bool = True
    max_context: Annotated[int, Between(0, unit="tokens")] = 0
    collective_timeout_s: Seconds = 30.0
    step_stall_s: Seconds = 120.0
    ffn_transport: FfnTransport = "auto"
    row_exact: RowExact = "auto"
    combine: CombineChoice = "auto"
    shared_expert: SharedExpert = "attn"
    ffn_timeout_s: Seconds = 5.0
    ffn_unavailable_s: Seconds = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError("model", self.model, "name a model (`anabranch models`), a folder or a GGUF file")


@dataclass(frozen=True, kw_only=True)
class RankOptions(Options):
    """What all workers of any pool have alike.

    Attributes:
        tp: tensor-parallel degree: heads and features are shared out over so many ranks, one process each; uneven
            shares are fine.
        threads: compute threads of each rank; 0: an even share of the cores.
        cores: CPU ids to pin to, dealt out evenly; empty: not pinned.
    """

    tp: Count = 1
    threads: Annotated[int, Between(0, 4096)] = 0
    cores: Annotated[tuple[int, ...], Between(0, 1 << 16)] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of each worker."""
        return self.tp


@dataclass(frozen=True, kw_only=True)
class PoolOptions(RankOptions):
    """What all workers of a pool that is given requests have alike.

    Attributes:
        cp: context-parallel degree: tokens and their KV are shared out over so many groups of tp ranks, so a worker has
            tp x cp ranks; uneven shares are fine.
        kv_cache_bytes: size of the KV pool of each rank.
        offload_bytes: host memory of each rank for the KV of requests that are preempted when blocks run out, so that
            they go on later without computing it again; 0: none. Taken by workers that generate.
        preemption: what becomes of the KV of preempted requests: offload (to host memory, while there is room),
            recompute (a decode or attn worker sends them back to prefill), or auto (whichever costs less time, as
            measured).
        max_running: most requests in one prefill step; where answers are generated, most requests at a time that
            hold KV blocks or are preempted, and never more than max_step_tokens: each has its place in every step.
        max_step_tokens: most new tokens in one step; longer prompts are computed in chunks.
        ring: what travels in ring attention (cp > 1): pass_kv, pass_q, or auto (by cost, step by step).
    """

    cp: Count = 1
    kv_cache_bytes: Size = 512 << 20
    offload_bytes: SizeOrNone = 256 << 20
    preemption: Preemption = "auto"
    max_running: Annotated[int, Between(1, 1 << 16, "requests")] = 64
    max_step_tokens: Tokens = 1024
    ring: RingChoice = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        Mesh(tp=self.tp, cp=self.cp)
        if self.preemption == "offload" and self.offload_bytes == 0:
            raise ConfigError("preemption", self.preemption, "needs host memory: give offload above 0, or choose auto")

    @property
    def num_ranks(self) -> int:
        """Ranks of each worker."""
        return self.tp * self.cp


@dataclass(frozen=True, kw_only=True)
class AttnOptions(Options):
    """What workers of the attn pool have beside `PoolOptions`.

    Attributes:
        lanes: groups that a worker's requests are dealt to, so that one computes attention while the rows of another
            are at FFN workers; 1: one after the other; 0: as many as are best by what steps take.
    """

    lanes: Annotated[int, Between(0, 4)] = 0


@dataclass(frozen=True, kw_only=True)
class FfnOptions(Options):
    """What workers of the ffn pool have beside `RankOptions`.

    Attributes:
        capacity_bytes: most weights of FFNs and experts that a worker holds, all its ranks together; 0: no limit.
        merge_wait_us: how long a layer's rows wait for those of other attention workers and lanes, so that all are
            computed as one; 0: whatever waits is computed at once.
    """

    capacity_bytes: SizeOrNone = 0
    merge_wait_us: Annotated[int, Between(0, 1_000_000, "microseconds")] = 0
