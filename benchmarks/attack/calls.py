"""Fuzzed calls of every method of the gateway: valid, mutated, of wrong types, huge, with wrong metadata and tokens."""

from __future__ import annotations

import asyncio
import functools
import random
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import Message

from anabranch_client.v1 import anabranch_pb2 as pb
from benchmarks.attack.fuzz import fill, mutated, wrong_types
from benchmarks.attack.tally import Tally
from benchmarks.tiny_model import VOCAB

NUM_CHANNELS = 4
NUM_AT_ONCE = 24
# Far more than any of these calls takes; one that ends so has been left hanging.
TIMEOUT_S = 60.0
# These never end by themselves.
WATCH_TIMEOUT_S = 0.1
HUNG = "hung"
_WATCH = "/grpc.health.v1.Health/Watch"
_FOLLOW = "/anabranch.v1.Admin/FollowFfnScale"
_ENDLESS = (_WATCH, _FOLLOW)
_REQUESTS: dict[str, type[Message]] = {
    "/anabranch.v1.Inference/Generate": pb.GenerateRequest,
    "/anabranch.v1.Inference/Tokenize": pb.TokenizeRequest,
    "/anabranch.v1.Inference/GetModel": pb.GetModelRequest,
    "/anabranch.v1.Admin/GetCluster": pb.GetClusterRequest,
    "/anabranch.v1.Admin/ReportExit": pb.ReportExitRequest,
    "/anabranch.v1.Admin/Drain": pb.DrainRequest,
    "/anabranch.v1.Admin/ScaleFfn": pb.ScaleFfnRequest,
    _FOLLOW: pb.FollowFfnScaleRequest,
}
_PATHS = (
    *(["/anabranch.v1.Inference/Generate"] * 10),
    *(["/anabranch.v1.Inference/Tokenize"] * 5),
    *_REQUESTS,
    "/grpc.health.v1.Health/Check",
    _WATCH,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/anabranch.v1.Inference/NoSuchMethod",
)


@dataclass(frozen=True)
class Call:
    """One call, ready to be sent."""

    path: str
    body: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    @property
    def timeout_s(self) -> float:
        return WATCH_TIMEOUT_S if self.path in _ENDLESS else TIMEOUT_S


class Calls:
    """Makes the calls of one seed.

    Args:
        token: Admin's own, for calls of Admin that get as far as their fields; these name nobody who lives.
    """

    def __init__(self, seed: int, token: str) -> None:
        self._rng = random.Random(f"{seed}/calls")
        self._token = token

    def make(self) -> Call:
        """The next call."""
        rng = self._rng
        path = rng.choice(_PATHS)
        kind = _REQUESTS.get(path)
        if kind is None:
            return Call(path, rng.randbytes(rng.choice((0, 1, 10, 300))))
        return Call(path, self._body(kind), self._metadata(path))

    def _body(self, kind: type[Message]) -> bytes:
        rng = self._rng
        draw = rng.random()
        if draw < 0.003:
            return rng.choice(_huge())
        if draw < 0.10:
            return rng.randbytes(rng.choice((0, 1, 3, 10, 100, 5000)))
        if draw < 0.25:
            return wrong_types(rng)
        message = kind()
        if draw < 0.5:
            fill(rng, message)
            return message.SerializeToString()
        self._make_valid(message)
        data = message.SerializeToString()
        return data if draw < 0.7 else mutated(rng, data)

    def _make_valid(self, message: Message) -> None:
        rng = self._rng
        words = " ".join(f"w{rng.randrange(VOCAB)}" for _ in range(rng.randint(1, 40)))
        match message:
            case pb.GenerateRequest():
                match rng.randrange(3):
                    case 0:
                        message.text = words
                    case 1:
                        message.token_ids.ids.extend(rng.randrange(VOCAB) for _ in range(rng.randint(1, 100)))
                    case _:
                        message.chat.messages.add(role="user", content=words)
                message.sampling.max_tokens = rng.randint(1, 4)
                message.sampling.temperature = rng.choice((0.0, 0.7, 2.0))
                message.sampling.logprobs = rng.randrange(4)
                message.request_id = rng.choice(("", "x", "again"))
                message.include_timings = rng.random() < 0.3
                message.cache_salt = rng.choice(("", "salt"))
            case pb.TokenizeRequest():
                message.text = words
            case pb.ReportExitRequest():
                message.worker, message.pid, message.how = "nobody", rng.randrange(2**31), "made up"
            case pb.DrainRequest():
                message.worker = "nobody"
            case pb.ScaleFfnRequest():
                message.workers = rng.choice((-1, 0, 257, 2**62))
            case pb.FollowFfnScaleRequest():
                message.max_workers = rng.choice((0, 1, 256, 257))

    def _metadata(self, path: str) -> tuple[tuple[str, str | bytes], ...]:
        rng = self._rng
        found: list[tuple[str, str | bytes]] = []
        if "Admin" in path:
            wrong = ("", "Bearer", "Bearer x", self._token, f"Basic {self._token}", f"Bearer {self._token[:-1]}0x")
            draw = rng.random()
            if draw < 0.4:
                found.append(("authorization", f"Bearer {self._token}"))
            elif draw < 0.9:
                found.append(("authorization", rng.choice(wrong)))
            if draw < 0.1:
                found.append(("authorization", "Bearer twice"))
        if rng.random() < 0.1:
            for _ in range(rng.choice((1, 3, 60))):
                found.append((f"x-{rng.getrandbits(32):x}", "y" * rng.choice((0, 10, 100))))
            found.append(("x-bytes-bin", rng.randbytes(rng.choice((0, 9, 20_000)))))
        return tuple(found)


@functools.cache
def _huge() -> tuple[bytes, ...]:
    """Messages whose fields have millions of entries or characters."""
    params = pb.SamplingParams
    ids = pb.TokenIds(ids=[5])
    return tuple(
        message.SerializeToString()
        for message in (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 3_000_000)),
            pb.GenerateRequest(text="w1 " * 1_300_000),
            pb.GenerateRequest(text="x" * 5_000_000),
            pb.GenerateRequest(token_ids=ids, sampling=params(stop_token_ids=[3] * 2_000_000)),
            pb.GenerateRequest(token_ids=ids, sampling=params(stop=["ab"] * 300_000)),
            pb.GenerateRequest(token_ids=ids, sampling=params(logit_bias=dict.fromkeys(range(100000), 1.0))),
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="w1")] * 100_000)),
            pb.GenerateRequest(request_id="i" * 1_000_000, text="w1"),
            pb.GenerateRequest(cache_salt="s" * 1_000_000, text="w1"),
        )
    )


async def attack(endpoint: str, seed: int, token: str, num_calls: int, tally: Tally) -> None:
    """Send so many calls, `NUM_AT_ONCE` at a time over a few connections, and count their ends as `calls`."""
    calls = Calls(seed, token)
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_http_proxy", 0),
    )
    left = num_calls

    async def send_on(channel: grpc.aio.Channel) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await _send(channel, calls.make(), tally)

    channels = [grpc.aio.insecure_channel(endpoint, options=options) for _ in range(NUM_CHANNELS)]
    try:
        await asyncio.gather(*(send_on(channels[number % NUM_CHANNELS]) for number in range(NUM_AT_ONCE)))
    finally:
        for channel in channels:
            await channel.close(None)


async def _send(channel: grpc.aio.Channel, call: Call, tally: Tally) -> None:
    """Every method is called as one that answers with a stream: on the wire there is no difference."""
    method = channel.unary_stream(call.path, None, None)
    try:
        async for _ in method(call.body, metadata=call.metadata, timeout=call.timeout_s):
            pass
        tally.call("calls", grpc.StatusCode.OK)
    except grpc.aio.AioRpcError as error:
        by_client = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not error.trailing_metadata()
        if by_client:
            tally.count("calls", "OK" if call.path in _ENDLESS else HUNG)
        else:
            tally.error("calls", error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # What grpc.aio makes of a call that the server has ended with CANCELLED.
        tally.call("calls", grpc.StatusCode.CANCELLED, "cancelled")
