"""From the orchestrator's values to the messages that clients and operators get."""

from __future__ import annotations

from collections import Counter

from anabranch.protocol.ffn import FfnLoad
from anabranch.request.ffn_times import FfnTraffic
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.answer import Chunk, Finished
from orchestrator.member import Member
from orchestrator.membership import Departure
from orchestrator.served_model import ServedModel
from orchestrator.worker_log import WorkerEvent

_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def accepted_event(request_id: str, num_prompt_tokens: int) -> pb.GenerateEvent:
    return pb.GenerateEvent(accepted=pb.Accepted(request_id=request_id, num_prompt_tokens=num_prompt_tokens))


def answer_event(part: Chunk | Finished, *, include_timings: bool) -> pb.GenerateEvent:
    """One part of an answer."""
    if isinstance(part, Chunk):
        return pb.GenerateEvent(tokens=_tokens(part))
    return pb.GenerateEvent(finished=_finished(part, include_timings=include_timings))


def _tokens(chunk: Chunk) -> pb.Tokens:
    return pb.Tokens(
        first_index=chunk.first_index,
        token_ids=chunk.token_ids,
        text_delta=chunk.text,
        logprobs=[
            pb.TokenLogprob(
                logprob=item.logprob,
                top=[pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in item.top],
            )
            for item in chunk.logprobs
        ],
    )


def _finished(end: Finished, *, include_timings: bool) -> pb.Finished:
    timings = end.timings
    return pb.Finished(
        finish_reason=_REASONS[end.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=end.num_prompt_tokens,
            num_output_tokens=end.num_output_tokens,
            num_cached_tokens=end.num_cached_tokens,
        ),
        timings=pb.Timings(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            kv_stream_s=timings.kv_stream_s,
            ttft_s=timings.ttft_s,
            tpot_s=timings.tpot_s,
            e2e_s=timings.e2e_s,
            recovery_s=timings.recovery_s,
        )
        if include_timings
        else None,
        route=end.route,
        kv=None
        if end.kv is None
        else pb.KvTransfer(bytes=end.kv.num_bytes, transport=end.kv.transport, overlap=end.kv.overlap),
        ffn=None
        if end.ffn is None
        else pb.FfnTimes(
            queue_s=end.ffn.queue_s,
            compute_s=end.ffn.compute_s,
            way_s=end.ffn.way_s,
            num_answers=end.ffn.num_answers,
            num_merged_rows=end.ffn.merged_rows,
        ),
        num_recoveries=end.num_recoveries,
        routes=[pb.Route(workers=taken.workers, num_tokens=taken.num_tokens, left=taken.left) for taken in end.routes],
    )


def model_message(model: ServedModel, max_context: int, members: list[Member]) -> pb.Model:
    """What is served, and by which pools."""
    shapes = Counter((member.role, member.info.tp, member.info.cp) for member in members)
    return pb.Model(
        name=model.name,
        max_context=max_context,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.has_chat_template,
        dtype=members[0].info.kv_dtype if members else "",
        pools=[pb.Pool(role=role, num_workers=num, tp=tp, cp=cp) for (role, tp, cp), num in shapes.items()],
    )


def worker_message(member: Member, now: float) -> pb.Worker:
    """A living worker; `now` is on the clock of its `heard_at`."""
    info, stats = member.info, member.stats
    return pb.Worker(
        name=info.name,
        role=info.role,
        state=member.state,
        pid=info.pid,
        host=info.host,
        device=info.device,
        tp=info.tp,
        cp=info.cp,
        num_threads=info.num_threads,
        planes=info.planes,
        num_requests=member.num_requests,
        num_running=stats.num_running if stats else 0,
        num_waiting=stats.num_waiting if stats else 0,
        num_leases=stats.num_leases if stats else 0,
        num_queued_tokens=stats.queued_tokens if stats else 0,
        num_free_blocks=stats.num_free_blocks if stats else info.num_blocks,
        num_total_blocks=stats.num_total_blocks if stats else info.num_blocks,
        last_heard_s=max(0.0, now - member.heard_at),
        block_size=info.block_size,
        max_context=info.max_context,
        num_offloaded=stats.num_offloaded if stats else 0,
        num_free_host_blocks=stats.num_free_host_blocks if stats else 0,
        num_total_host_blocks=stats.num_total_host_blocks if stats else 0,
        ffn_traffic=None if stats is None or stats.ffn_traffic is None else _traffic(stats.ffn_traffic),
        ffn_load=None if stats is None or stats.ffn_load is None else _load(stats.ffn_load),
    )


def _traffic(traffic: FfnTraffic) -> pb.FfnTraffic:
    return pb.FfnTraffic(
        num_calls=traffic.num_calls,
        num_rows=traffic.num_rows,
        num_retries=traffic.num_retries,
        num_second=traffic.num_second,
        num_answers=traffic.num_answers,
        queue_s=traffic.queue_s,
        compute_s=traffic.compute_s,
        num_merged_rows=traffic.merged_rows,
        stepping_s=traffic.stepping_s,
        waited_s=traffic.waited_s,
    )


def _load(load: FfnLoad) -> pb.FfnLoad:
    return pb.FfnLoad(
        num_products=load.num_products,
        num_rows=load.num_rows,
        busy_s=load.busy_s,
        up_s=load.up_s,
        bytes=load.num_bytes,
    )


def departure_message(departure: Departure) -> pb.Departure:
    return pb.Departure(name=departure.name, pid=departure.pid, reason=departure.reason, expected=departure.expected)


def worker_event_message(num_missed: int, event: WorkerEvent) -> pb.WorkerEvent:
    return pb.WorkerEvent(
        sequence=event.sequence,
        at_s=event.at_s,
        worker=event.worker,
        role=event.role,
        pid=event.pid,
        change=event.change,
        reason=event.reason,
        num_missed=num_missed,
    )
