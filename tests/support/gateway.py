"""A gateway without a cluster: gives the answer, and has the room, that a test says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from anabranch_client.errors import CODE_KEY
from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc

NUM_PROMPT_TOKENS = 3


class Gateway(pb_grpc.InferenceServicer):
    """Answers `Generate` with one text; use as a context manager.

    Attributes:
        text: of every answer.
        room: most output tokens that the context has room for.
        asked: `max_tokens` of each request, None where it was not set.
        prompts: the text of each request.
    """

    def __init__(self, text: str = "an answer", room: int = 1000) -> None:
        self.text = text
        self.room = room
        self.asked: list[int | None] = []
        self.prompts: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        pb_grpc.add_InferenceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        asked = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None
        self.asked.append(asked)
        self.prompts.append(request.text)
        if (self.room if asked is None else asked) > self.room or self.room < 1:
            context.set_trailing_metadata(((CODE_KEY, "context_exceeded"),))
            context.abort(grpc.StatusCode.OUT_OF_RANGE, f"max_tokens: is {asked}; there is room for {self.room}")
        yield pb.GenerateEvent(accepted=pb.Accepted(request_id="r", num_prompt_tokens=NUM_PROMPT_TOKENS))
        yield pb.GenerateEvent(tokens=pb.Tokens(first_index=0, token_ids=[1], text_delta=self.text))
        usage = pb.Usage(num_prompt_tokens=NUM_PROMPT_TOKENS, num_output_tokens=1)
        yield pb.GenerateEvent(finished=pb.Finished(finish_reason=pb.FINISH_REASON_STOP, usage=usage, route=["w-0"]))

    def __enter__(self) -> Gateway:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
