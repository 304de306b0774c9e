"""Everything in a control message is bounded, and what an honest process says lies within the bounds."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest
from msgspec import inspect

import anabranch.protocol
import anabranch.request
from anabranch.errors import InvalidRequest, MalformedMessage
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.ffn import FfnLoad
from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Ended,
    Generate,
    Message,
    PrefillEnded,
    Register,
    Reserved,
    Tokens,
    ToOrchestrator,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch.request.ffn_times import FfnTimes, FfnTraffic
from anabranch.request.request import Request
from anabranch.request.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MODEL_STOP_IDS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from anabranch.request.token import Token, TokenLogprob
from transport.control.codec import MAX_MESSAGE_BYTES, Codec

pytestmark = pytest.mark.unit
MOST_STOP_IDS = MAX_STOP_TOKEN_IDS + MAX_MODEL_STOP_IDS

VOCAB = 1 << 20


def structs() -> list[type[msgspec.Struct]]:
    """Every struct that the modules of the protocol, and of what it carries, define."""
    found = []
    modules = (
        module
        for package in (anabranch.protocol, anabranch.request)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    )
    for module_info in modules:
        module = importlib.import_module(module_info.name)
        found += [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    return found


def unbounded(kind: inspect.Type, path: str) -> Iterator[str]:
    """Paths of what has no bound in a type, and in all that it is made of."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            for field in fields:
                yield from unbounded(field.type, f"{path or cls.__name__}.{field.name}")
        case inspect.IntType():
            if (kind.ge is None and kind.gt is None) or (kind.le is None and kind.lt is None):
                yield path
        case inspect.StrType() | inspect.BytesType() | inspect.ByteArrayType() | inspect.MemoryViewType():
            if kind.max_length is None:
                yield path
        case inspect.DictType():
            if kind.max_length is None:
                yield path
            yield from unbounded(kind.key_type, f"{path}[key]")
            yield from unbounded(kind.value_type, f"{path}[value]")
        case inspect.CollectionType():
            if kind.max_length is None:
                yield path
            yield from unbounded(kind.item_type, f"{path}[item]")
        case inspect.TupleType(item_types=item_types):
            for place, item in enumerate(item_types):
                yield from unbounded(item, f"{path}[{place}]")
        case inspect.UnionType(types=types):
            for member in types:
                yield from unbounded(member, path)
        case inspect.FloatType() | inspect.BoolType() | inspect.NoneType() | inspect.LiteralType():
            pass
        case _:
            yield f"{path}: {type(kind).__name__}, which this test does not know"


def test_every_field_of_every_struct_is_bounded() -> None:
    kinds = structs()
    assert {Register, Tokens, Reserved, Request, KvStreamStats, WorkerStats} <= set(kinds)
    assert [path for kind in kinds for path in unbounded(inspect.type_info(kind), "")] == []


class Careless(msgspec.Struct):
    """What the test above must find."""

    count: int
    names: tuple[str, ...]
    table: dict[str, tuple[int, ...]]
    pairs: tuple[tuple[int, float], ...] | None = None


def test_the_walk_finds_what_is_unbounded() -> None:
    assert list(unbounded(inspect.type_info(Careless), "")) == [
        "Careless.count",
        "Careless.names",
        "Careless.names[item]",
        "Careless.table",
        "Careless.table[key]",
        "Careless.table[value]",
        "Careless.table[value][item]",
        "Careless.pairs",
        "Careless.pairs[item][0]",
    ]


INFO = WorkerInfo(
    name="decode-0",
    role="decode",
    pid=7,
    host="here",
    model="m",
    model_fingerprint="f",
    vocab_size=VOCAB,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    kv_dtype="float32",
    max_context=1000,
    num_blocks=10,
    block_size=16,
    planes=("tcp",),
    device="cpu",
    num_threads=1,
)
STATS = WorkerStats(num_free_blocks=1, num_total_blocks=1, num_running=0, num_waiting=0, num_leases=0, queued_tokens=0)
NAN = float("nan")
CASES: dict[str, Message] = {
    "the issue's pid": Register(worker=msgspec.structs.replace(INFO, pid=2**64 - 1)),
    "a pid below zero": Register(worker=msgspec.structs.replace(INFO, pid=-1)),
    "threads": Register(worker=msgspec.structs.replace(INFO, num_threads=2**63)),
    "a name of 1 MB": Register(worker=msgspec.structs.replace(INFO, name="n" * (1 << 20))),
    "10,000 planes": Register(worker=msgspec.structs.replace(INFO, planes=("tcp",) * 10_000)),
    "free blocks": Beat(stats=msgspec.structs.replace(STATS, num_free_blocks=2**64 - 1)),
    "queued tokens below zero": Beat(stats=msgspec.structs.replace(STATS, queued_tokens=-5)),
    "calls below zero": Beat(stats=msgspec.structs.replace(STATS, ffn_traffic=FfnTraffic(num_calls=-1))),
    "no time that lanes wait": Beat(stats=msgspec.structs.replace(STATS, ffn_traffic=FfnTraffic(waited_s=NAN))),
    "products": Beat(stats=msgspec.structs.replace(STATS, ffn_load=FfnLoad(num_products=2**63))),
    "busy for ever": Beat(stats=msgspec.structs.replace(STATS, ffn_load=FfnLoad(busy_s=float("inf")))),
    "rows of products": Ended(request_id="r", epoch=0, reason="stop", ffn=FfnTimes(merged_rows=2**60)),
    "a wait below zero": Ended(request_id="r", epoch=0, reason="stop", ffn=FfnTimes(way_s=-1.0)),
    "cached tokens": PrefillEnded(request_id="r", epoch=0, num_cached_tokens=2**63),
    "KV bytes": PrefillEnded(
        request_id="r",
        epoch=0,
        kv=KvStreamStats(payload_bytes=2**63 - 1, transport="tcp", stream_s=1.0, exposed_s=0.0),
    ),
    "a time that is none": Ended(request_id="r", epoch=0, reason="stop", queue_s=NAN),
    "a time below zero": Ended(request_id="r", epoch=0, reason="stop", prefill_s=-1.0),
    "an epoch": Ended(request_id="r", epoch=2**64 - 1, reason="stop"),
    "a token id": Tokens(tokens=(Token(request_id="r", epoch=0, index=0, token_id=2**40),)),
    "an index below zero": Tokens(tokens=(Token(request_id="r", epoch=0, index=-1, token_id=1),)),
    "alternatives": Tokens(
        tokens=(
            Token(
                request_id="r",
                epoch=0,
                index=0,
                token_id=1,
                logprob=TokenLogprob(logprob=-1.0, top=((1, -1.0),) * (MAX_LOGPROBS + 1)),
            ),
        )
    ),
    "an error of 1 MB": Ended(
        request_id="r", epoch=0, reason="failed", error=WireError(code="internal", message="x" * (1 << 20))
    ),
    "a request id": Ended(request_id="r" * 129, epoch=0, reason="stop"),
}


@pytest.mark.parametrize("message", CASES.values(), ids=CASES.keys())
def test_what_no_worker_would_say_is_refused(message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    with pytest.raises(MalformedMessage, match="Expected"):
        Codec(ToOrchestrator, MAX_MESSAGE_BYTES).decode(data)


def test_the_largest_request_that_is_accepted_reaches_a_worker() -> None:
    """What `validate` lets through, decoding lets through: a request that was accepted is not lost on its way."""
    sampling = SamplingParams(
        max_tokens=2**63 - 1,
        temperature=100.0,
        top_k=2**63 - 1,
        seed=2**63 - 1,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -1e308),
        logprobs=MAX_LOGPROBS,
        stop=("é" * MAX_STOP_STRING_CHARS,) * MAX_STOP_STRINGS,
        stop_token_ids=frozenset(range(VOCAB - MOST_STOP_IDS, VOCAB)),
    )
    sampling.validate(VOCAB)
    message = Generate(
        request=Request(request_id="r", epoch=2**40, prompt_ids=(VOCAB - 1,) * 100_000, sampling=sampling)
    )
    codec = Codec(ToWorker, MAX_MESSAGE_BYTES)
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("stop_token_ids", frozenset(range(MOST_STOP_IDS + 1)), "at most 320 ids"),
        ("stop", ("x",) * (MAX_STOP_STRINGS + 1), "at most 16 strings"),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0), "at most 1024 entries"),
    ],
)
def test_what_decoding_would_refuse_is_not_accepted(field: str, value: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SamplingParams(**{field: value}).validate(VOCAB)


def test_what_a_worker_says_goes_through() -> None:
    layout = KvLayout(dtype="bfloat16", num_layers=80, num_kv_heads=8, head_dim=128, block_size=16, tp=8, cp=8)
    destination = KvDestination(
        worker="decode-0",
        stream_id=2**62,
        generation=2**41,
        layout=layout,
        addresses=({"tcp": "tcp:127.0.0.1:9:" + "0" * 32, "ucx": "x" * 200},) * 64,
        block_ids=tuple(range(8192)),
        num_cached_tokens=0,
        num_tokens=131072,
        lease_s=60.0,
    )
    codec = Codec(ToOrchestrator, MAX_MESSAGE_BYTES)
    for message in (
        Register(worker=INFO),
        Beat(stats=STATS),
        Reserved(request_id="0" * 32, epoch=3, destination=destination),
        Ended(request_id="r", epoch=0, reason="failed", error=WireError.of(ValueError("x" * 5000))),
    ):
        assert codec.decode(codec.encode(message)) == message
