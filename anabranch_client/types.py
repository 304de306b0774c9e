"""What the client takes and gives: frozen values, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

FinishReason = Literal["stop", "length"]
Health = Literal["serving", "not_serving", "unknown"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat; `role` is what the model's template knows: system, user, assistant."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or the turns of a chat (the model's template is applied)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None takes the server's default.

    Attributes:
        max_tokens: most tokens to generate [as many as the context has room for].
        temperature: 0 is greedy [0].
        top_k: keep the k likeliest; 0 keeps all [0].
        top_p: keep the likeliest whose probabilities reach p [1].
        min_p: drop what is less likely than this share of the likeliest [0].
        repetition_penalty: over prompt and output [1].
        presence_penalty: subtracted once from each token already generated [0].
        frequency_penalty: subtracted for every time that a token was generated [0].
        seed: makes sampling repeat [drawn].
        logit_bias: token id -> value added to its logit.
        logprobs: number of likeliest alternatives to report with each token [no log-probabilities].
        stop: strings that end the answer and are not part of it.
        stop_token_ids: ids that end the answer.
        ignore_eos: go on past the model's end-of-sequence token.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False


# Events of a stream ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The server has taken the request."""

    request_id: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural-log probability of the chosen token, and the likeliest tokens' as (token id, logprob)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Some tokens in order, the first with index `first_index`; `text` is the answer's next part."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted; `num_cached_tokens` of the prompt were cached by requests of the same `cache_salt`."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds.

    Attributes:
        queue_s: accepted to prefill's first chunk.
        prefill_s: first chunk to first token sampled.
        kv_stream_s: first KV slice posted to commit acknowledged.
        ttft_s: accepted to first token.
        tpot_s: mean time between output tokens.
        e2e_s: accepted to the end.
        recovery_s: from each failure of a worker to the next token, all together.
    """

    queue_s: float
    prefill_s: float
    kv_stream_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    recovery_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """The KV cache's way from prefill to decode; `overlap` is the share of it that prefill hid, 0 to 1."""

    bytes: int
    transport: str
    overlap: float


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnTimes:
    """What the FFNs cost that other workers computed, over all layers of all steps of the request.

    Attributes:
        queue_s: at FFN workers, until a product began.
        compute_s: products, with whatever rows they were merged.
        way_s: the rest: there and back, sent again, and until the attention worker looked.
        num_answers: of FFN workers.
        num_merged_rows: rows of the products that these came from.
    """

    queue_s: float
    compute_s: float
    way_s: float
    num_answers: int
    num_merged_rows: int

    @property
    def rows_per_product(self) -> float:
        """Of the products that answered it; a product that answered it twice counts twice."""
        return _share(self.num_merged_rows, self.num_answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The workers of one epoch of a request.

    Attributes:
        num_tokens: that it brought.
        left: why the request went on elsewhere: an error's code, or preempted; empty: it ended here.
    """

    workers: tuple[str, ...]
    num_tokens: int
    left: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a stream.

    `kv` is None where one worker did it all, `timings` where they were not asked for, `ffn` where no FFN worker had a
    part in it. `num_recoveries` counts how often workers failed the request, and it went on from the tokens that it
    had; `routes` has one for each epoch (the latest 64), `route` is the last of them.
    """

    finish_reason: FinishReason
    usage: Usage
    route: tuple[str, ...]
    timings: Timings | None
    kv: KvTransfer | None
    ffn: FfnTimes | None = None
    num_recoveries: int = 0
    routes: tuple[Route, ...] = ()


Event: TypeAlias = Accepted | Tokens | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer; its end is described at `Finished`."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    route: tuple[str, ...]
    timings: Timings | None
    kv: KvTransfer | None
    ffn: FfnTimes | None = None
    num_recoveries: int = 0
    routes: tuple[Route, ...] = ()


# The model and the cluster --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers of one role and shape."""

    role: str
    num_workers: int
    tp: int
    cp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served.

    Attributes:
        max_context: most tokens (prompt and answer) of one request.
        dtype: of the KV cache; empty until a worker has registered.
    """

    name: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    dtype: str
    pools: tuple[Pool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnTraffic:
    """What an attention worker's first rank has sent to FFN workers since it started; its other ranks send as much.

    Attributes:
        num_calls, num_rows: sent, each sending counted.
        num_retries: calls that had to go to another FFN worker.
        num_second: calls that were late and went to a second one too.
        num_answers: that counted.
        queue_s, compute_s: of these, all together.
        num_merged_rows: rows of the products that these came from.
        stepping_s: in which some lane had a step.
        waited_s: of this, in which no lane could go on.
    """

    num_calls: int
    num_rows: int
    num_retries: int
    num_second: int
    num_answers: int
    queue_s: float
    compute_s: float
    num_merged_rows: int
    stepping_s: float
    waited_s: float

    @property
    def mean_queue_s(self) -> float:
        """From a call's arrival to its product."""
        return _share(self.queue_s, self.num_answers)

    @property
    def mean_compute_s(self) -> float:
        """Of a call's product."""
        return _share(self.compute_s, self.num_answers)

    @property
    def rows_per_product(self) -> float:
        """Of a call's product, whoever's rows they were."""
        return _share(self.num_merged_rows, self.num_answers)

    @property
    def waited_share(self) -> float:
        """Of the time of steps, in which no lane could go on; 0 to 1."""
        return _share(self.waited_s, self.stepping_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnLoad:
    """What an FFN worker has done since it started; between two of these lies what it did meanwhile.

    Attributes:
        num_rows: of all products.
        busy_s: computing, of the `up_s` that it has served.
        bytes: of the weights that its first rank holds now.
    """

    num_products: int
    num_rows: int
    busy_s: float
    up_s: float
    bytes: int

    @property
    def busy_share(self) -> float:
        """0 to 1."""
        return _share(self.busy_s, self.up_s)

    @property
    def rows_per_product(self) -> float:
        """Of all calls that were merged."""
        return _share(self.num_rows, self.num_products)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A living worker; loads are as of its last beat, `last_heard_s` seconds ago.

    Attributes:
        state: ready, suspect (it failed several requests in a row, and gets one at a time), cordoned or draining.
        num_requests: that the orchestrator has given it and that have not ended.
        num_offloaded: of these, the ones that were preempted, with their KV in host memory.
        ffn_traffic: of an attention worker that has ended a step.
        ffn_load: of an FFN worker.
    """

    name: str
    role: str
    state: str
    pid: int
    host: str
    device: str
    tp: int
    cp: int
    num_threads: int
    planes: tuple[str, ...]
    num_requests: int
    num_running: int
    num_waiting: int
    num_leases: int
    num_queued_tokens: int
    num_free_blocks: int
    num_total_blocks: int
    last_heard_s: float
    block_size: int
    max_context: int
    num_offloaded: int = 0
    num_free_host_blocks: int = 0
    num_total_host_blocks: int = 0
    ffn_traffic: FfnTraffic | None = None
    ffn_load: FfnLoad | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A worker that is gone; `expected` when it was drained or told to go."""

    name: str
    pid: int
    reason: str
    expected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """Something that happened to a worker.

    Attributes:
        sequence: counts from 1, anew where the orchestrator was started again.
        at_s: Unix time.
        change: came, ready, suspect, cordoned, draining, gone or fenced (it spoke though it was gone).
        num_missed: events between the one before and this one that the orchestrator no longer kept.
    """

    sequence: int
    at_s: float
    worker: str
    role: str
    pid: int
    change: str
    reason: str
    num_missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The orchestrator's view of its workers and requests."""

    workers: tuple[Worker, ...]
    departures: tuple[Departure, ...]
    num_requests: int
    num_queued: int
    serving: bool
    draining: bool
