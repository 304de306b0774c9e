"""The one place where the client's values and protobuf messages are turned into each other."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch_client.errors import InvalidRequest, ServerFailed
from anabranch_client.types import (
    Accepted,
    ChatMessage,
    Cluster,
    Completion,
    Departure,
    Event,
    FfnLoad,
    FfnTimes,
    FfnTraffic,
    Finished,
    FinishReason,
    KvTransfer,
    Model,
    Pool,
    Prompt,
    Route,
    Sampling,
    Timings,
    TokenLogprob,
    Tokens,
    Usage,
    Worker,
    WorkerEvent,
)
from anabranch_client.v1 import anabranch_pb2 as pb

_OPTIONAL_FIELDS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


def _invalid(field: str, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"{field}: {error}", code="invalid_request")


def _prompt_field(prompt: Prompt) -> dict[str, str | pb.TokenIds | pb.Chat]:
    """The prompt as the one field of the message's `prompt` that is to be set."""
    if isinstance(prompt, str):
        prompt.encode("utf-8")
        return {"text": prompt}
    messages = [item for item in prompt if isinstance(item, ChatMessage)]
    if messages and len(messages) == len(prompt):
        return {"chat": pb.Chat(messages=[pb.ChatMessage(role=m.role, content=m.content) for m in messages])}
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, ChatMessage):
            raise TypeError("mixes token ids and chat messages")
        ids.append(item)
    return {"token_ids": pb.TokenIds(ids=ids)}


def _to_sampling(sampling: Sampling) -> pb.SamplingParams:
    message = pb.SamplingParams()
    for field in _OPTIONAL_FIELDS:
        value = getattr(sampling, field)
        if value is None:
            continue
        try:
            setattr(message, field, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise _invalid(field, error) from None
    try:
        for token, bias in sampling.logit_bias.items():
            message.logit_bias[token] = bias
    except (TypeError, ValueError, OverflowError) as error:
        raise _invalid("logit_bias", error) from None
    if isinstance(sampling.stop, str):
        raise InvalidRequest("stop: must be a sequence of strings, not one string", code="invalid_request")
    try:
        message.stop.extend(sampling.stop)
    except (TypeError, ValueError) as error:
        raise _invalid("stop", error) from None
    try:
        message.stop_token_ids.extend(sampling.stop_token_ids)
    except (TypeError, ValueError) as error:
        raise _invalid("stop_token_ids", error) from None
    message.ignore_eos = sampling.ignore_eos
    return message


def to_generate(
    prompt: Prompt,
    sampling: Sampling | None,
    *,
    request_id: str | None = None,
    cache_salt: str | None = None,
    priority: int = 0,
    tenant: str | None = None,
    idempotency_key: str | None = None,
) -> pb.GenerateRequest:
    """The request's message. Raises InvalidRequest for what protobuf cannot carry."""
    try:
        field = _prompt_field(prompt)
    except (TypeError, ValueError) as error:
        raise _invalid("prompt", error) from None
    request = pb.GenerateRequest(include_timings=True)
    given = {
        "request_id": request_id or "",
        "cache_salt": cache_salt or "",
        "priority": priority,
        "tenant": tenant,
        "idempotency_key": idempotency_key,
    }
    for name, value in given.items():
        try:
            if value is not None:
                setattr(request, name, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise _invalid(name, error) from None
    request.MergeFrom(pb.GenerateRequest(**field))  # type: ignore[arg-type]
    if sampling is not None:
        request.sampling.CopyFrom(_to_sampling(sampling))
    return request


def to_tokenize(prompt: str | Sequence[ChatMessage]) -> pb.TokenizeRequest:
    """The message that asks for a prompt's token ids. Raises InvalidRequest."""
    try:
        field = _prompt_field(prompt)
        if "token_ids" in field:
            raise TypeError("must be text or chat messages")
        return pb.TokenizeRequest(**field)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise _invalid("prompt", error) from None


def from_event(event: pb.GenerateEvent) -> Event:
    """One event of a stream. Raises ServerFailed where the server sent none of those known here."""
    kind = event.WhichOneof("event")
    if kind == "tokens":
        tokens = event.tokens
        return Tokens(
            first_index=tokens.first_index,
            token_ids=tuple(tokens.token_ids),
            text=tokens.text_delta,
            logprobs=tuple(
                TokenLogprob(logprob=item.logprob, top=tuple((top.token_id, top.logprob) for top in item.top))
                for item in tokens.logprobs
            ),
        )
    if kind == "accepted":
        return Accepted(request_id=event.accepted.request_id, num_prompt_tokens=event.accepted.num_prompt_tokens)
    if kind == "finished":
        return _from_finished(event.finished)
    raise ServerFailed("the server sent an event that this client does not know", code="unknown_event")


def _from_finished(finished: pb.Finished) -> Finished:
    reason: FinishReason = "stop" if finished.finish_reason == pb.FINISH_REASON_STOP else "length"
    timings = finished.timings
    return Finished(
        finish_reason=reason,
        usage=Usage(
            num_prompt_tokens=finished.usage.num_prompt_tokens,
            num_output_tokens=finished.usage.num_output_tokens,
            num_cached_tokens=finished.usage.num_cached_tokens,
        ),
        route=tuple(finished.route),
        timings=Timings(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            kv_stream_s=timings.kv_stream_s,
            ttft_s=timings.ttft_s,
            tpot_s=timings.tpot_s,
            e2e_s=timings.e2e_s,
            recovery_s=timings.recovery_s,
        )
        if finished.HasField("timings")
        else None,
        kv=KvTransfer(bytes=finished.kv.bytes, transport=finished.kv.transport, overlap=finished.kv.overlap)
        if finished.HasField("kv")
        else None,
        ffn=_from_ffn_times(finished.ffn) if finished.HasField("ffn") else None,
        num_recoveries=finished.num_recoveries,
        routes=tuple(
            Route(workers=tuple(route.workers), num_tokens=route.num_tokens, left=route.left)
            for route in finished.routes
        ),
    )


def _from_ffn_times(times: pb.FfnTimes) -> FfnTimes:
    return FfnTimes(
        queue_s=times.queue_s,
        compute_s=times.compute_s,
        way_s=times.way_s,
        num_answers=times.num_answers,
        num_merged_rows=times.num_merged_rows,
    )


class Gather:
    """Collects a stream's events into a Completion."""

    def __init__(self) -> None:
        self._request_id = ""
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self._token_ids.extend(event.token_ids)
            self._texts.append(event.text)
            self._logprobs.extend(event.logprobs)
        elif isinstance(event, Accepted):
            self._request_id = event.request_id
        else:
            self._finished = event

    def completion(self) -> Completion:
        """The whole answer. Raises ServerFailed when the stream ended without Finished."""
        if self._finished is None:
            raise ServerFailed("the stream ended without its last event", code="stream_cut_short")
        return Completion(
            request_id=self._request_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finished.finish_reason,
            usage=self._finished.usage,
            route=self._finished.route,
            timings=self._finished.timings,
            kv=self._finished.kv,
            ffn=self._finished.ffn,
            num_recoveries=self._finished.num_recoveries,
            routes=self._finished.routes,
        )


def from_model(model: pb.Model) -> Model:
    return Model(
        name=model.name,
        max_context=model.max_context,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(model.eos_token_ids),
        has_chat_template=model.has_chat_template,
        dtype=model.dtype,
        pools=tuple(Pool(role=pool.role, num_workers=pool.num_workers, tp=pool.tp, cp=pool.cp) for pool in model.pools),
    )


def from_cluster(cluster: pb.Cluster) -> Cluster:
    return Cluster(
        workers=tuple(_from_worker(worker) for worker in cluster.workers),
        departures=tuple(
            Departure(name=gone.name, pid=gone.pid, reason=gone.reason, expected=gone.expected)
            for gone in cluster.departures
        ),
        num_requests=cluster.num_requests,
        num_queued=cluster.num_queued,
        serving=cluster.serving,
        draining=cluster.draining,
    )


def from_worker_event(event: pb.WorkerEvent) -> WorkerEvent:
    return WorkerEvent(
        sequence=event.sequence,
        at_s=event.at_s,
        worker=event.worker,
        role=event.role,
        pid=event.pid,
        change=event.change,
        reason=event.reason,
        num_missed=event.num_missed,
    )


def _from_worker(worker: pb.Worker) -> Worker:
    return Worker(
        name=worker.name,
        role=worker.role,
        state=worker.state,
        pid=worker.pid,
        host=worker.host,
        device=worker.device,
        tp=worker.tp,
        cp=worker.cp,
        num_threads=worker.num_threads,
        planes=tuple(worker.planes),
        num_requests=worker.num_requests,
        num_running=worker.num_running,
        num_waiting=worker.num_waiting,
        num_leases=worker.num_leases,
        num_queued_tokens=worker.num_queued_tokens,
        num_free_blocks=worker.num_free_blocks,
        num_total_blocks=worker.num_total_blocks,
        last_heard_s=worker.last_heard_s,
        block_size=worker.block_size,
        max_context=worker.max_context,
        num_offloaded=worker.num_offloaded,
        num_free_host_blocks=worker.num_free_host_blocks,
        num_total_host_blocks=worker.num_total_host_blocks,
        ffn_traffic=_from_traffic(worker.ffn_traffic) if worker.HasField("ffn_traffic") else None,
        ffn_load=_from_load(worker.ffn_load) if worker.HasField("ffn_load") else None,
    )


def _from_traffic(traffic: pb.FfnTraffic) -> FfnTraffic:
    return FfnTraffic(
        num_calls=traffic.num_calls,
        num_rows=traffic.num_rows,
        num_retries=traffic.num_retries,
        num_second=traffic.num_second,
        num_answers=traffic.num_answers,
        queue_s=traffic.queue_s,
        compute_s=traffic.compute_s,
        num_merged_rows=traffic.num_merged_rows,
        stepping_s=traffic.stepping_s,
        waited_s=traffic.waited_s,
    )


def _from_load(load: pb.FfnLoad) -> FfnLoad:
    return FfnLoad(
        num_products=load.num_products,
        num_rows=load.num_rows,
        busy_s=load.busy_s,
        up_s=load.up_s,
        bytes=load.bytes,
    )
