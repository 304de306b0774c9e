"""Messages between workers and the orchestrator.

Orchestrator -> worker: Registered, Reserve, Prefill, Generate, Cancel, Place, FfnNodes, Drain, Shutdown, Beat.
Worker -> orchestrator: Register, Beat, Reserved, Tokens, Preempted, PrefillEnded, Ended, Placed,
ExpertRows, Leaving, Failing.

A request's life on a split pair: Reserve -> Reserved (or Ended: failed), Prefill -> PrefillEnded, Tokens...,
Ended. On a colocated worker: Generate -> Tokens..., Ended. `Ended` is sent exactly once for each
(request_id, epoch) that a decode, attention or colocated worker was given; PrefillEnded once for each Prefill.
An FFN worker is given no requests: see `anabranch.protocol.ffn`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, Extent, Int63, Name, Seconds
from anabranch.bounds import Place as PlaceName
from anabranch.protocol.ffn import Addresses, ExpertCounts, FfnLoad, FfnPlacement, Holding
from anabranch.protocol.kv import MAX_PLANES, KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.request.ffn_times import FfnTimes, FfnTraffic
from anabranch.request.request import EndReason, Request
from anabranch.request.token import Token

Role = Literal["prefill", "decode", "colocated", "attn", "ffn"]

MAX_STEP_SEQUENCES = 1 << 16


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all control messages; `type` on the wire is the class's name."""


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model a process serves; the orchestrator's and all workers' must be alike in all but `model`.

    Attributes:
        model: what its user called it.
        model_fingerprint: of the whole configuration and the weights; empty: the weights are not here.
    """

    model: PlaceName
    model_fingerprint: Name
    vocab_size: Extent
    hidden_size: Extent
    num_layers: Extent
    num_heads: Extent
    num_kv_heads: Extent
    head_dim: Extent


class WorkerInfo(ModelIdentity, frozen=True, kw_only=True):
    """Who a worker is. Pools whose model or `kv_dtype` differ are refused.

    Attributes:
        max_context: most tokens (prompt and answer) that one request may hold here.
        num_blocks: KV blocks in the worker's pool.
        planes: tensor planes that the worker can use, best first.
        addresses: of an FFN worker: M2N backend name -> address.
        incarnation: of an FFN worker: drawn at random by each process.
        capacity_bytes: of an FFN worker: most weights that it holds; 0: as many as it is given.
        shared_experts: of an FFN worker: whether it holds shared experts too, so that attention workers do not.
        heartbeat_s: time between its beats; 0: not told.
        step_stall_s: a `work_age_s` above this means that it hangs, however well it beats; 0: not told.
    """

    name: Name
    role: Role
    pid: Extent
    host: PlaceName
    kv_dtype: Name
    max_context: Count
    num_blocks: Extent
    block_size: Extent
    planes: Annotated[tuple[Name, ...], Meta(max_length=MAX_PLANES)]
    device: Name
    num_threads: Extent
    tp: Extent = 1
    cp: Extent = 1
    addresses: Addresses = {}
    incarnation: Int63 = 0
    capacity_bytes: Count = 0
    shared_experts: bool = False
    heartbeat_s: Seconds = 0.0
    step_stall_s: Seconds = 0.0


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's load, sent with every beat.

    Attributes:
        num_free_blocks: neither held nor cached, or cached and unused.
        num_leases: reservations that have neither committed nor aborted.
        queued_tokens: prompt tokens that wait to be computed.
        num_offloaded: requests that were preempted with their KV in host memory.
        num_free_host_blocks, num_total_host_blocks: room for more of them.
        num_done: commands and steps that the worker's threads have ended.
        work_age_s: how long the one in hand has lasted; a thread that hangs shows here, though beats go on.
        ffn_traffic: of an attention worker, once it has ended a step.
        ffn_load: of an FFN worker.
    """

    num_free_blocks: Count
    num_total_blocks: Count
    num_running: Count
    num_waiting: Count
    num_leases: Count
    queued_tokens: Count
    num_offloaded: Count = 0
    num_free_host_blocks: Count = 0
    num_total_host_blocks: Count = 0
    num_done: Count = 0
    work_age_s: Seconds = 0.0
    ffn_traffic: FfnTraffic | None = None
    ffn_load: FfnLoad | None = None


# Orchestrator -> worker ---------------------------------------------------------------------------------


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """The answer to Register. With an `error` the worker ends."""

    error: WireError | None = None


class Reserve(Message, frozen=True, kw_only=True, tag="reserve"):
    request: Request


class Prefill(Message, frozen=True, kw_only=True, tag="prefill"):
    request: Request
    destination: KvDestination


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    request: Request


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """End this attempt wherever it is; unknown ones are ignored. Answered with Ended or PrefillEnded."""

    request_id: Name
    epoch: Count


class Place(Message, frozen=True, kw_only=True, tag="place"):
    """To an FFN worker: load what is missing of this; answered with Placed.

    What is too much goes after `ffn_timeout_s`, or before where it takes the room of what is missing.
    """

    version: Count
    holding: Holding


class FfnNodes(Message, frozen=True, kw_only=True, tag="ffn_nodes"):
    """To an attention worker: where rows go from now on. An older version than the last one is ignored."""

    placement: FfnPlacement


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Take no new work, finish what runs, then exit 0."""


class Shutdown(Message, frozen=True, kw_only=True, tag="shutdown"):
    """Exit now; what runs fails."""


# Worker -> orchestrator ---------------------------------------------------------------------------------


class Register(Message, frozen=True, kw_only=True, tag="register"):
    worker: WorkerInfo


class Reserved(Message, frozen=True, kw_only=True, tag="reserved"):
    request_id: Name
    epoch: Count
    destination: KvDestination


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """Tokens of one step, any number of requests."""

    tokens: Annotated[tuple[Token, ...], Meta(max_length=MAX_STEP_SEQUENCES)]


class Preempted(Message, frozen=True, kw_only=True, tag="preempted"):
    """The attempt was preempted for lack of blocks and goes on by itself; until then no token comes."""

    request_id: Name
    epoch: Count


class PrefillEnded(Message, frozen=True, kw_only=True, tag="prefill_ended"):
    """One Prefill is over: committed, or `error` says why not.

    Attributes:
        queue_s: Prefill received to first chunk computed.
        prefill_s: first chunk started to first token sampled.
        num_cached_tokens: prompt tokens that the prefix cache gave.
    """

    request_id: Name
    epoch: Count
    queue_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    num_cached_tokens: Count = 0
    kv: KvStreamStats | None = None
    error: WireError | None = None


class Ended(Message, frozen=True, kw_only=True, tag="ended"):
    """The one terminal message of an attempt; all its tokens were sent before.

    `preempted`: blocks ran out; the orchestrator may go on with a new epoch. `queue_s`, `prefill_s` and
    `num_cached_tokens` are set by colocated workers, `ffn` by attention workers.
    """

    request_id: Name
    epoch: Count
    reason: EndReason
    error: WireError | None = None
    queue_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    num_cached_tokens: Count = 0
    ffn: FfnTimes | None = None


class Placed(Message, frozen=True, kw_only=True, tag="placed"):
    """An FFN worker serves what it was told to hold, or `error` says why not."""

    version: Count
    error: WireError | None = None


class ExpertRows(Message, frozen=True, kw_only=True, tag="expert_rows"):
    """An FFN worker's experts of sparse layers have computed so many rows since it last said so."""

    rows: ExpertCounts


class Leaving(Message, frozen=True, kw_only=True, tag="leaving"):
    """An FFN worker is to end, whoever said so: its experts go to others, then it gets Drain. It serves meanwhile."""


class Failing(Message, frozen=True, kw_only=True, tag="failing"):
    """A worker's last message: it cannot go on, and all that it holds ends with `error`."""

    error: WireError


# Both ways ----------------------------------------------------------------------------------------------


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """A sign of life, both ways; workers add their load."""

    stats: WorkerStats | None = None


ToWorker = Registered | Reserve | Prefill | Generate | Cancel | Place | FfnNodes | Drain | Shutdown | Beat
ToOrchestrator = (
    Register | Reserved | Tokens | Preempted | PrefillEnded | Ended | Placed | ExpertRows | Leaving | Failing | Beat
)
