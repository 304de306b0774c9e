"""What workers and the orchestrator say to each other.

Orchestrator -> worker: Registered, Reserve, Prefill, Generate, Cancel, Drain, Shutdown, Beat.
Worker -> orchestrator: Register, Beat, Reserved, Tokens, Paused, PrefillEnded, Ended.

A request's life on a split pair: Reserve -> Reserved (or Ended: failed), Prefill -> PrefillEnded, Tokens...,
Ended. On a colocated worker: Generate -> Tokens..., Ended. `Ended` is sent exactly once for each
(request_id, epoch) that a decode or colocated worker was given; PrefillEnded once for each Prefill.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.request.request import EndReason, Request
from anabranch.request.token import Token

Role = Literal["prefill", "decode", "colocated"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all control messages; `type` on the wire is the class's name."""


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model a process serves; the orchestrator's and all workers' must be alike in all but `model`.

    Attributes:
        model: what its user called it.
        model_fingerprint: of the whole configuration and the weights; empty: the weights are not here.
    """

    model: str
    model_fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class WorkerInfo(ModelIdentity, frozen=True, kw_only=True):
    """Who a worker is. Pools whose model or `kv_dtype` differ are refused.

    Attributes:
        max_context: most tokens (prompt and answer) that one request may hold here.
        num_blocks: KV blocks in the worker's pool.
        planes: tensor planes that the worker can use, best first.
    """

    name: str
    role: Role
    pid: int
    host: str
    kv_dtype: str
    max_context: int
    num_blocks: int
    block_size: int
    planes: tuple[str, ...]
    device: str
    num_threads: int
    tp: int = 1
    cp: int = 1


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's load, sent with every beat.

    Attributes:
        num_free_blocks: neither held nor cached, or cached and unused.
        num_leases: reservations that have neither committed nor aborted.
        queued_tokens: prompt tokens that wait to be computed.
        num_parked: requests that have given way with their KV in host memory.
        num_free_host_blocks, num_total_host_blocks: room for more of them.
    """

    num_free_blocks: int
    num_total_blocks: int
    num_running: int
    num_waiting: int
    num_leases: int
    queued_tokens: int
    num_parked: int = 0
    num_free_host_blocks: int = 0
    num_total_host_blocks: int = 0


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

    request_id: str
    epoch: int


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Take no new work, finish what runs, then exit 0."""


class Shutdown(Message, frozen=True, kw_only=True, tag="shutdown"):
    """Exit now; what runs fails."""


# Worker -> orchestrator ---------------------------------------------------------------------------------


class Register(Message, frozen=True, kw_only=True, tag="register"):
    worker: WorkerInfo


class Reserved(Message, frozen=True, kw_only=True, tag="reserved"):
    request_id: str
    epoch: int
    destination: KvDestination


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """Tokens of one step, any number of requests."""

    tokens: tuple[Token, ...]


class Paused(Message, frozen=True, kw_only=True, tag="paused"):
    """The attempt has given way for lack of blocks and goes on by itself; until then no token comes."""

    request_id: str
    epoch: int


class PrefillEnded(Message, frozen=True, kw_only=True, tag="prefill_ended"):
    """One Prefill is over: committed, or `error` says why not.

    Attributes:
        queue_s: Prefill received to first chunk computed.
        prefill_s: first chunk started to first token sampled.
        num_cached_tokens: prompt tokens that the prefix cache gave.
    """

    request_id: str
    epoch: int
    queue_s: float = 0.0
    prefill_s: float = 0.0
    num_cached_tokens: int = 0
    kv: KvStreamStats | None = None
    error: WireError | None = None


class Ended(Message, frozen=True, kw_only=True, tag="ended"):
    """The one terminal message of an attempt; all its tokens were sent before.

    `preempted`: blocks ran out; the orchestrator may go on with a new epoch. `queue_s`, `prefill_s` and
    `num_cached_tokens` are set by colocated workers.
    """

    request_id: str
    epoch: int
    reason: EndReason
    error: WireError | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    num_cached_tokens: int = 0


# Both ways ----------------------------------------------------------------------------------------------


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """A sign of life, both ways; workers add their load."""

    stats: WorkerStats | None = None


ToWorker = Registered | Reserve | Prefill | Generate | Cancel | Drain | Shutdown | Beat
ToOrchestrator = Register | Reserved | Tokens | Paused | PrefillEnded | Ended | Beat
