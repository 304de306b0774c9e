"""Every bad input that a client can send: a status, a code, and a message that names the field."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from anabranch.protocol.workers import Generate
from anabranch_client import (
    ChatMessage,
    ContextExceeded,
    Draining,
    InvalidRequest,
    Sampling,
    ServerFailed,
    Unavailable,
)
from anabranch_client.client import Client
from anabranch_client.v1 import anabranch_pb2 as pb
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

GENERATE = "/anabranch.v1.Inference/Generate"
TOKENIZE = "/anabranch.v1.Inference/Tokenize"
NAN, INF = float("nan"), float("inf")


def sampled(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(**fields))


def ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))


def chat(*turns: tuple[str, str]) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns]))


def long_text(length: int, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x" * length, sampling=pb.SamplingParams(**sampling))


INVALID = "invalid_request"
CONTEXT = "context_exceeded"

# What is sent -> code, and how the message begins.
TABLE: dict[str, tuple[pb.GenerateRequest | bytes, str, str]] = {
    "priority too low": (pb.GenerateRequest(text="abc", priority=-101), INVALID, "priority: is -101; give -100 (goes"),
    "priority huge": (pb.GenerateRequest(text="abc", priority=2**63 - 1), INVALID, f"priority: is {2**63 - 1}"),
    "tenant empty": (pb.GenerateRequest(text="abc", tenant=""), INVALID, "tenant: must have 1 to 128 printable ASCII"),
    "tenant of 10 kB": (pb.GenerateRequest(text="abc", tenant="x" * 10_000), INVALID, "tenant: has 10000 characters"),
    "tenant with a space": (pb.GenerateRequest(text="abc", tenant="a b"), INVALID, "tenant: must have 1 to 128"),
    "key empty": (pb.GenerateRequest(text="abc", idempotency_key=""), INVALID, "idempotency_key: must have 1 to 128"),
    "key too long": (
        pb.GenerateRequest(text="abc", idempotency_key="k" * 129),
        INVALID,
        "idempotency_key: has 129 characters; at most 128 are allowed",
    ),
    "no prompt": (pb.GenerateRequest(), INVALID, "prompt: is missing; set text, token_ids or chat"),
    "empty text": (pb.GenerateRequest(text=""), INVALID, "text: is empty"),
    "empty ids": (ids(), INVALID, "token_ids: is empty"),
    "empty chat": (chat(), INVALID, "chat: is empty"),
    "no role": (chat(("", "hi")), INVALID, "chat: message 0 has no role"),
    "template refuses": (chat(("robot", "hi")), INVALID, "messages: the model's chat template refuses"),
    "negative id": (ids(1, -1), INVALID, "token_ids: -1 at position 1 is out of range; ids go from 0 to 255"),
    "id too large": (ids(1, 2, 256), INVALID, "token_ids: 256 at position 2"),
    "huge id": (ids(2**62), INVALID, f"token_ids: {2**62} at position 0"),
    "prompt too long": (long_text(2000), CONTEXT, "prompt: has 2000 tokens; the context holds 1024"),
    "prompt fills the context": (long_text(1024), CONTEXT, "prompt: has 1024 tokens; the context holds 1024"),
    "too many ids": (ids(*[1] * 5000), CONTEXT, "prompt: has 5000 tokens; the context holds 1024"),
    "max_tokens negative": (sampled(max_tokens=-1), INVALID, "max_tokens: is -1; it must be at least 1"),
    "max_tokens zero": (sampled(max_tokens=0), INVALID, "max_tokens: is 0"),
    "max_tokens beyond": (
        sampled(max_tokens=1022),
        CONTEXT,
        "max_tokens: is 1022; with a prompt of 3 tokens the context of 1024 has room for 1021",
    ),
    "max_tokens huge": (sampled(max_tokens=2**63 - 1), CONTEXT, f"max_tokens: is {2**63 - 1}"),
    "temperature NaN": (sampled(temperature=NAN), INVALID, "temperature: is nan; it must be a finite number"),
    "temperature negative": (sampled(temperature=-0.1), INVALID, "temperature: is -0.1"),
    "temperature infinite": (sampled(temperature=INF), INVALID, "temperature: is inf"),
    "top_k negative": (sampled(top_k=-1), INVALID, "top_k: is -1"),
    "top_p zero": (sampled(top_p=0.0), INVALID, "top_p: is 0.0"),
    "top_p above one": (sampled(top_p=1.01), INVALID, "top_p: is 1.01"),
    "top_p NaN": (sampled(top_p=NAN), INVALID, "top_p: is nan"),
    "min_p above one": (sampled(min_p=1.5), INVALID, "min_p: is 1.5"),
    "repetition_penalty zero": (sampled(repetition_penalty=0.0), INVALID, "repetition_penalty: is 0.0"),
    "presence_penalty infinite": (sampled(presence_penalty=-INF), INVALID, "presence_penalty: is -inf"),
    "frequency_penalty NaN": (sampled(frequency_penalty=NAN), INVALID, "frequency_penalty: is nan"),
    "seed negative": (sampled(seed=-5), INVALID, "seed: is -5"),
    "logprobs negative": (sampled(logprobs=-1), INVALID, "logprobs: is -1"),
    "logprobs too many": (sampled(logprobs=21), INVALID, "logprobs: is 21; it must be between 0 and 20"),
    "logit_bias NaN": (sampled(logit_bias={1: NAN}), INVALID, "logit_bias: is {1: nan}"),
    "logit_bias id": (sampled(logit_bias={256: 1.0}), INVALID, "logit_bias: is {256: 1.0}"),
    "stop empty": (sampled(stop=[""]), INVALID, "stop: is ('',)"),
    "logit_bias too many": (
        sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
        INVALID,
        "logit_bias: has more than the 1024 entries that are allowed",
    ),
    "stop too many": (sampled(stop=["x"] * 17), INVALID, "stop: has more than the 16 entries that are allowed"),
    "stop too long": (sampled(stop=["x" * 257]), INVALID, "stop: has 257 characters; at most 256 are allowed"),
    "stop_token_ids": (sampled(stop_token_ids=[-3]), INVALID, "stop_token_ids: is frozenset({-3})"),
    "stop_token_ids too many": (
        sampled(stop_token_ids=[1] * 257),
        INVALID,
        "stop_token_ids: has more than the 256 entries that are allowed",
    ),
    "stop_token_ids by the million": (
        sampled(stop_token_ids=[1] * 4_100_000),
        INVALID,
        "stop_token_ids: has more than the 256 entries that are allowed",
    ),
    "chat too long": (
        chat(*[("user", "x")] * 1025),
        INVALID,
        "messages: has more than the 1024 entries that are allowed",
    ),
    "role too long": (chat(("user" * 100, "x")), INVALID, "role: has 400 characters; at most 64 are allowed"),
    "request_id with spaces": (
        pb.GenerateRequest(request_id="a b", text="x"),
        INVALID,
        "request_id: must have 1 to 128",
    ),
    "request_id too long": (
        pb.GenerateRequest(request_id="a" * 129, text="x"),
        INVALID,
        "request_id: has 129 characters; at most 128 are allowed",
    ),
    "text not UTF-8": (b"\x12\x02\xff\xfe", INVALID, "text: is not valid UTF-8"),
    "content not UTF-8": (b"\x22\x05\x0a\x03\x12\x01\xff", INVALID, "chat.messages.content: is not valid UTF-8"),
    "stop not UTF-8": (b"\x12\x01a\x2a\x03\x62\x01\xc3", INVALID, "sampling.stop: is not valid UTF-8"),
    "garbage": (b"\xff\xff\xff\xff", INVALID, "the message cannot be parsed"),
    "cut short": (b"\x12\x20abc", INVALID, "the message cannot be parsed"),
}


async def refused(channel: grpc.aio.Channel, method: str, message: pb.GenerateRequest | bytes) -> grpc.aio.AioRpcError:
    """Send a message that must be refused."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    multi = channel.unary_stream if method == GENERATE else channel.unary_unary
    call = multi(method, request_serializer=bytes, response_deserializer=bytes)(data, timeout=WAIT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (anext(aiter(call)) if method == GENERATE else call)
    return caught.value


def test_every_bad_field_is_named(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint) as channel:
            for name, (message, code, begins) in TABLE.items():
                error = await refused(channel, GENERATE, message)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, error)
                assert dict(error.trailing_metadata()).get("anabranch-code") == code, name
                assert error.details().startswith(begins), (name, error.details())
        assert worker.received == []
        # And it goes on.
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1021)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, [97, 0], 0)
        await worker.ended(request, "stop")
        assert (await answer).text == "a"

    play(scenario)


def test_too_many_ids_are_refused_before_they_are_parsed(play):
    async def scenario(world):
        await world.worker("both-0", "colocated", max_context=512)
        # What it says after the ids cannot be parsed; nobody looks.
        data = {
            "packed": ids(*[1] * 2000).SerializeToString() + b"\xff",
            "not packed": b"\x1a\xd0\x0f" + b"\x08\x01" * 1000 + b"\xff",
        }
        num_ids = {"packed": 2000, "not packed": 512}
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint) as channel:
            for name, message in data.items():
                error = await refused(channel, GENERATE, message)
                assert dict(error.trailing_metadata()).get("anabranch-code") == CONTEXT, (name, error)
                says = f"prompt: has {num_ids[name]} tokens; the context holds 512"
                assert error.details().startswith(says), (name, error.details())
            # As many as there is room for are looked at.
            error = await refused(channel, GENERATE, ids(*[1] * 510, 256))
            assert error.details().startswith("token_ids: 256 at position 510")

    play(scenario)


def test_an_oversized_message_is_refused_and_the_server_goes_on(play):
    async def scenario(world):
        with pytest.raises(InvalidRequest, match="larger than max") as caught:
            await world.client.complete("x" * 100_000)
        assert caught.value.code == "message_too_large"
        assert await world.client.tokenize("abc") == (97, 98, 99)

    play(scenario, max_request_bytes=50_000)


def test_the_client_names_what_cannot_even_be_sent(play):
    async def scenario(world):
        for call, begins in (
            (lambda: world.client.generate("\ud800"), "prompt: "),
            (lambda: world.client.generate([2**70]), "prompt: "),
            (lambda: world.client.generate([1, ChatMessage("user", "x")]), "prompt: mixes"),
            (lambda: world.client.generate("a", Sampling(top_k=2**70)), "top_k: "),
            (lambda: world.client.generate("a", Sampling(temperature="hot")), "temperature: "),
            (lambda: world.client.generate("a", Sampling(stop="word")), "stop: "),
            (lambda: world.client.generate("a", Sampling(logit_bias={"x": 1.0})), "logit_bias: "),
            (lambda: world.client.generate("a", Sampling(stop_token_ids=[0.5])), "stop_token_ids: "),
        ):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert str(caught.value).startswith(begins), caught.value

    play(scenario)


def test_prompts_are_bounded_before_they_are_encoded(play):
    async def scenario(world):
        await world.worker("both-0", "colocated")
        world.model.gate.clear()  # whatever reached the encoder would wait
        world.model.longest_token_chars = 3
        user = ChatMessage("user", "x" * 5000)
        for prompt, says in (
            ("x" * 5001, "text: has 5001 characters; max_prompt_chars allows 5000"),
            ([user], "chat: has 5004 characters; max_prompt_chars allows 5000"),
            ([ChatMessage("", "x" * 9000)], "chat: message 0 has no role"),
            ([ChatMessage("r" * 65, "x")], "role: has 65 characters; at most 64 are allowed"),
        ):
            for call in (world.client.complete, world.client.tokenize):
                with pytest.raises(InvalidRequest, match=says):
                    await call(prompt)
        says = "prompt: has 3073 characters; a token has at most 3, and the context holds 1024 tokens"
        with pytest.raises(ContextExceeded, match=says):
            await world.client.complete("x" * 3073)
        world.model.gate.set()
        # To count the tokens of a text that is too long is no mistake.
        assert len(await world.client.tokenize("x" * 3073)) == 3073
        # A template may leave messages out, so a chat is judged by what becomes of it.
        with pytest.raises(ContextExceeded, match="prompt: has 4006 tokens; the context holds 1024"):
            await world.client.complete([ChatMessage("user", "x" * 4000)])

    play(scenario, max_prompt_chars=5000)


def test_tokenize(play):
    async def scenario(world):
        assert await world.client.tokenize("aé") == (97, 195, 169)
        assert await world.client.tokenize([ChatMessage("user", "x")]) == tuple(b"user:x\n")
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint) as channel:
            for message, begins in (
                (pb.TokenizeRequest(), "prompt: is missing; set text or chat"),
                (pb.TokenizeRequest(text=""), "text: is empty"),
                (b"\x0a\x01\xff", "text: is not valid UTF-8"),
            ):
                error = await refused(channel, TOKENIZE, message)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert error.details().startswith(begins)

    play(scenario)


def test_a_model_without_a_chat_template_says_so(play):
    async def scenario(world):
        await world.worker("both-0", "colocated")
        world.model.has_chat_template = False
        with pytest.raises(InvalidRequest, match="chat: the model bytes has no chat template; send text or token_ids"):
            await world.client.complete([ChatMessage("user", "x")])
        assert (await world.client.model()).has_chat_template is False

    play(scenario)


def test_a_bug_while_encoding_is_an_internal_error_and_no_more(play):
    async def scenario(world):
        def encode(text: str) -> list[int]:
            raise RuntimeError("secret path")

        await world.worker("both-0", "colocated")
        world.model.encode = encode
        for call in (world.client.complete("abc"), world.client.tokenize("abc")):
            with pytest.raises(ServerFailed, match="its log says why") as caught:
                await call
            assert caught.value.code == "internal"
            assert "secret" not in str(caught.value)

    play(scenario)


def test_a_smaller_worker_sets_the_context(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill", max_context=512)
        await world.worker("decode-0", "decode", max_context=256)
        assert (await world.client.model()).max_context == 256
        with pytest.raises(ContextExceeded, match="the context of 256 has room for 253"):
            await world.client.complete("abc", Sampling(max_tokens=254))

    play(scenario)


def test_while_draining_requests_are_refused(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        running = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = (await worker.expect(Generate)).request
        drain = asyncio.create_task(world.orchestrator.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining, match="shutting down") as caught:
            await world.client.complete("abc")
        assert caught.value.code == "draining"
        assert await world.client.health() == "not_serving"
        await worker.tokens(request, "k", 0)
        await worker.ended(request, "length")
        assert (await running).text == "k"
        await drain

    play(scenario)


def test_what_is_not_finished_when_draining_ends_is_ended(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        running = asyncio.create_task(world.client.complete("abc"))
        await worker.expect(Generate)
        await world.orchestrator.drain()
        with pytest.raises(Draining, match=r"drain_timeout_s: not finished 0\.3 s after"):
            await running

    play(scenario, drain_timeout_s=0.3)


def test_nobody_there(play):
    async def scenario(world):
        with Client("127.0.0.1:1") as client:
            with pytest.raises(Unavailable) as caught:
                await asyncio.to_thread(client.complete, "abc", timeout_s=5)
            assert caught.value.code == "unavailable"

    play(scenario)
