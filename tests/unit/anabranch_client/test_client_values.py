"""The SDK apart from any server: what it imports, how errors are named, that its stubs fit its contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

import anabranch_client
from anabranch_client import ChatMessage, InvalidRequest, Overloaded, Sampling, ServerFailed
from anabranch_client.calls import health_request, health_response
from anabranch_client.convert import Gather, from_event, to_generate
from anabranch_client.errors import ClientError, code_of, error_of, retry_after_of
from anabranch_client.v1 import anabranch_pb2 as pb

pytestmark = pytest.mark.unit

ROOT = Path(anabranch_client.__file__).parent.parent


def test_importing_the_sdk_brings_neither_torch_nor_the_server():
    code = (
        "import sys, anabranch_client; "
        "names = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(names & {'torch', 'anabranch', 'transformers', 'msgspec', 'zmq', 'numpy', 'transport'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_committed_stubs_are_of_the_committed_contract(tmp_path):
    described = tmp_path / "set"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", f"--descriptor_set_out={described}"),
            "anabranch_client/v1/anabranch.proto",
        ],
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file
    ours = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(ours)
    for message in (file, ours):
        message.ClearField("source_code_info")
        clear_json_names(message.message_type)
    assert ours == file


def clear_json_names(messages) -> None:
    """protoc writes them into descriptor sets only."""
    for message in messages:
        clear_json_names(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "InvalidRequest"),
        (grpc.StatusCode.INVALID_ARGUMENT, "context_exceeded", "ContextExceeded"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", "Overloaded"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "out_of_blocks", "Overloaded"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, None, "DeadlineExceeded"),
        (grpc.StatusCode.CANCELLED, None, "CallCancelled"),
        (grpc.StatusCode.UNAVAILABLE, None, "Unavailable"),
        (grpc.StatusCode.UNAVAILABLE, "worker_died", "WorkerDied"),
        (grpc.StatusCode.UNAVAILABLE, "draining", "Draining"),
        (grpc.StatusCode.UNAVAILABLE, "checksum_mismatch", "Unavailable"),
        (grpc.StatusCode.UNIMPLEMENTED, None, "ServerFailed"),
    ],
)
def test_errors_are_typed(status, code, kind):
    error = error_of(status, "what happened", code)
    assert type(error).__name__ == kind
    assert isinstance(error, ClientError)
    assert error.code == (code or status.name.lower())
    assert str(error) == error.message == "what happened"


def test_the_code_is_read_from_trailers():
    assert code_of((("x", "y"), ("anabranch-code", "draining"))) == "draining"
    assert code_of((("anabranch-code", b"draining"),)) == "draining"
    assert code_of(()) is None
    assert code_of(None) is None


def test_only_what_is_given_is_sent():
    request = to_generate("hi", Sampling(temperature=0.0, stop=["."], logit_bias={3: -1.0}))
    assert request.text == "hi"
    sampling = request.sampling
    assert sampling.HasField("temperature")
    assert not any(sampling.HasField(field) for field in ("max_tokens", "top_k", "top_p", "seed", "logprobs"))
    assert (list(sampling.stop), dict(sampling.logit_bias), request.request_id) == (["."], {3: -1.0}, "")
    assert to_generate([1, 2], None, request_id="me").token_ids.ids == [1, 2]
    chat = to_generate([ChatMessage("user", "hi")], None).chat
    assert [(message.role, message.content) for message in chat.messages] == [("user", "hi")]
    assert to_generate([], None).WhichOneof("prompt") == "token_ids"


def test_a_stream_without_an_end_is_an_error():
    gather = Gather()
    gather.add(from_event(pb.GenerateEvent(tokens=pb.Tokens(first_index=0, token_ids=[1], text_delta="a"))))
    with pytest.raises(ServerFailed, match="without its last event"):
        gather.completion()
    with pytest.raises(ServerFailed, match="does not know"):
        from_event(pb.GenerateEvent())


def test_healths_messages_are_the_standard_ones():
    from grpc_health.v1 import health_pb2

    for service in ("", "anabranch.v1.Inference"):
        assert health_request(service) == health_pb2.HealthCheckRequest(service=service).SerializeToString()
    for status, expected in (
        (health_pb2.HealthCheckResponse.SERVING, "serving"),
        (health_pb2.HealthCheckResponse.NOT_SERVING, "not_serving"),
        (health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, "unknown"),
        (health_pb2.HealthCheckResponse.UNKNOWN, "unknown"),
    ):
        assert health_response(health_pb2.HealthCheckResponse(status=status).SerializeToString()) == expected


@pytest.mark.parametrize(
    ("value", "seconds"), [("1.5", 1.5), (b"0.25", 0.25), ("-1", None), ("nan", None), ("1e9", None), ("soon", None)]
)
def test_when_to_try_again(value, seconds):
    trailers = (("anabranch-code", "overloaded"), ("anabranch-retry-after-s", value))
    error = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", code_of(trailers), retry_after_of(trailers))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == seconds
    assert retry_after_of(()) is None
    assert Overloaded("x", code="overloaded").retry_after_s is None


@pytest.mark.parametrize(
    ("field", "value"), [("priority", 2**70), ("priority", "high"), ("tenant", 5), ("idempotency_key", b"\xff")]
)
def test_what_a_message_cannot_carry_is_named(field, value):
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        to_generate("x", None, **{field: value})


def test_an_empty_name_is_told_from_none():
    request = to_generate("x", None, tenant="", priority=-3)
    assert request.HasField("tenant")
    assert not request.HasField("idempotency_key")
    assert request.priority == -3
