"""The Inference service: takes clients' requests in, and gives their answers out at the pace they read.

A call's life: parsed -> checked -> encoded (in a thread) -> accepted -> its events are written until the end.
Each write waits for the client to have room; a client that makes none for `client_stall_s` loses its request.
A call that goes away, whenever that is, stops its request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
from google.protobuf.message import Message

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError, DeadlineExceeded, Draining, InvalidRequest, RequestCancelled
from anabranch.request.request import Request
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.admission import Messages, checked_ids, encode, fitted, request_id_of, sampling_of, text_or_messages
from orchestrator.answer import Finished
from orchestrator.calls import abort, answered
from orchestrator.context_limit import ContextLimit
from orchestrator.dispatcher import Dispatcher
from orchestrator.events import accepted_event, answer_event, model_message
from orchestrator.lifecycle import Lifecycle
from orchestrator.membership import Membership
from orchestrator.parsing import parser
from orchestrator.served_model import ServedModel

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_GenerateContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateEvent]


class Gateway:
    """Serves `anabranch.v1.Inference`."""

    def __init__(
        self, config: OrchestratorConfig, model: ServedModel, membership: Membership, dispatcher: Dispatcher
    ) -> None:
        self._config = config
        self._model = model
        self._membership = membership
        self._dispatcher = dispatcher
        self._encoders = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="encode")
        self.draining = False
        self.num_calls = 0
        self.num_encoding = 0

    def handlers(self) -> grpc.GenericRpcHandler[Message, Message]:
        """What the gRPC server calls."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate,
                    request_deserializer=parser(pb.GenerateRequest),
                    response_serializer=pb.GenerateEvent.SerializeToString,
                ),
                "Tokenize": grpc.unary_unary_rpc_method_handler(
                    answered(self.tokenize),
                    request_deserializer=parser(pb.TokenizeRequest),
                    response_serializer=pb.TokenizeResponse.SerializeToString,
                ),
                "GetModel": grpc.unary_unary_rpc_method_handler(
                    answered(self.get_model),
                    request_deserializer=parser(pb.GetModelRequest),
                    response_serializer=pb.Model.SerializeToString,
                ),
            },
        )

    def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)

    # Generate ---------------------------------------------------------------------------------------------

    async def generate(self, message: pb.GenerateRequest | InvalidRequest, context: _GenerateContext) -> None:
        """Accepted, Tokens..., Finished; or a status with the error's code."""
        lifecycle: Lifecycle | None = None
        self.num_calls += 1
        try:
            if isinstance(message, InvalidRequest):
                raise message
            lifecycle = await self._admit(message)
            request = lifecycle.request
            await self._write(context, accepted_event(request.request_id, len(request.prompt_ids)))
            part = None
            while not isinstance(part, Finished):
                part = await lifecycle.answer.next()
                await self._write(context, answer_event(part, include_timings=message.include_timings))
        except AnabranchError as error:
            if lifecycle is not None:
                lifecycle.stop(error)
            await abort(context, error)
        except grpc.aio.InternalError as error:
            logger.debug("a write failed, its client is gone: %s", error)
        except Exception:
            logger.exception("a Generate call failed")
            if lifecycle is not None:
                lifecycle.stop(AnabranchError("the gateway failed"))
            await abort(context, AnabranchError("the gateway failed; its log says why"))
        finally:
            if lifecycle is not None:
                lifecycle.stop(RequestCancelled("the client went away"))
            self.num_calls -= 1

    async def _admit(self, message: pb.GenerateRequest) -> Lifecycle:
        """Check everything that can be checked without a worker, and start the request. Raises AnabranchError."""
        accepted_at = time.monotonic()
        self._check_open()
        request_id = request_id_of(message)
        self._dispatcher.check_id(request_id)
        sampling = sampling_of(message.sampling, self._model.vocab_size)
        prompt = text_or_messages(message)
        self._dispatcher.check_room(self.num_encoding)
        if prompt is None:
            prompt_ids = checked_ids(message.token_ids.ids, self._model.vocab_size, self.context_limit())
        else:
            prompt_ids = await self._encode(prompt)
            self._check_open()
        sampling = fitted(sampling, len(prompt_ids), self.context_limit())
        request = Request(request_id=request_id, epoch=0, prompt_ids=prompt_ids, sampling=sampling)
        return self._dispatcher.submit(request, accepted_at)

    async def _write(self, context: _GenerateContext, event: pb.GenerateEvent) -> None:
        """Write once the client has room. Raises DeadlineExceeded when it makes none."""
        try:
            # Not wait_for: before Python 3.12 it can lose the cancellation of a client that goes away meanwhile.
            async with asyncio.timeout(self._config.client_stall_s):
                await context.write(event)
        except TimeoutError:
            raise DeadlineExceeded(
                f"client_stall_s: the client read nothing for {self._config.client_stall_s:g} s"
            ) from None

    def context_limit(self) -> ContextLimit:
        """How long a request may be: what living workers hold, or what the model was made for."""
        return self._membership.context_limit() or ContextLimit(num_tokens=self._model.max_context)

    def _check_open(self) -> None:
        if self.draining:
            raise Draining("the orchestrator is shutting down and takes no new requests")

    async def _encode(self, prompt: str | Messages) -> tuple[int, ...]:
        self.num_encoding += 1
        try:
            loop = asyncio.get_running_loop()
            ids = tuple(await loop.run_in_executor(self._encoders, encode, self._model, prompt))
        finally:
            self.num_encoding -= 1
        if not ids:
            raise InvalidRequest("has no tokens", "prompt")
        return ids

    # Tokenize, GetModel -----------------------------------------------------------------------------------

    async def tokenize(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        prompt = text_or_messages(message)
        assert prompt is not None
        self._dispatcher.check_room(self.num_encoding)
        return pb.TokenizeResponse(token_ids=await self._encode(prompt))

    async def get_model(self, message: pb.GetModelRequest) -> pb.Model:
        return model_message(self._model, self.context_limit().num_tokens, self._membership.members)
