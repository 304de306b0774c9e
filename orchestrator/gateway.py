"""The Inference service: takes clients' requests in, and gives their answers out at the pace they read.

A call's life: parsed -> checked -> encoded (in another process) -> accepted -> its events are written until the end.
Each write waits for the client to have room; a client that makes none for `client_stall_s` loses its request
(`CallGuard`).
A call that goes away, whenever that is, stops its request.
"""

from __future__ import annotations

import logging
import time
from functools import partial

import grpc
import grpc.aio
from google.protobuf.message import Message

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError, Draining, InvalidRequest, RequestCancelled
from anabranch.request.request import Request
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.admission import (
    check_fits,
    check_num_ids,
    checked_ids,
    client_id_of,
    drawn_id,
    fitted,
    sampling_of,
    text_or_messages,
)
from orchestrator.answer import Finished
from orchestrator.calls import abort, answered
from orchestrator.context_limit import ContextLimit
from orchestrator.dispatcher import Dispatcher
from orchestrator.events import accepted_event, answer_event, model_message
from orchestrator.lifecycle import Lifecycle
from orchestrator.membership import Membership
from orchestrator.parsing import parser
from orchestrator.served_model import Prompt, PromptEncoder, ServedModel
from orchestrator.waiting_room import message_bytes

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_GenerateContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateEvent]


class Gateway:
    """Serves `anabranch.v1.Inference`."""

    def __init__(
        self,
        config: OrchestratorConfig,
        model: ServedModel,
        encoder: PromptEncoder,
        membership: Membership,
        dispatcher: Dispatcher,
    ) -> None:
        self._config = config
        self._model = model
        self._encoder = encoder
        self._membership = membership
        self._dispatcher = dispatcher
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
                    request_deserializer=self._parsed,
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

    def _parsed(self, data: bytes) -> pb.GenerateRequest | InvalidRequest:
        """A request; more prompt ids than the context holds now are refused before they are parsed."""
        # Asked for once: ids that are not packed are checked one by one.
        check = partial(check_num_ids, limit=self.context_limit())
        return parser(pb.GenerateRequest, check)(data)

    # Generate ---------------------------------------------------------------------------------------------

    async def generate(self, message: pb.GenerateRequest | InvalidRequest, context: _GenerateContext) -> None:
        """Accepted, Tokens..., Finished; or a status with the error's code."""
        lifecycle: Lifecycle | None = None
        self.num_calls += 1
        try:
            if isinstance(message, InvalidRequest):
                raise message
            lifecycle = await self._admit(message)
            await context.write(accepted_event(lifecycle.client_id, len(lifecycle.request.prompt_ids)))
            part = None
            while not isinstance(part, Finished):
                part = await lifecycle.answer.next()
                await context.write(answer_event(part, include_timings=message.include_timings))
        except AnabranchError as error:
            if lifecycle is not None:
                lifecycle.inbox.stop(error)
            await abort(context, error)
        except grpc.aio.InternalError as error:
            logger.debug("a write failed, its client is gone: %s", error)
        except Exception:
            logger.exception("a Generate call failed")
            if lifecycle is not None:
                lifecycle.inbox.stop(AnabranchError("the gateway failed"))
            await abort(context, AnabranchError("the gateway failed; its log says why"))
        finally:
            if lifecycle is not None:
                lifecycle.inbox.stop(RequestCancelled("the client went away"))
            self.num_calls -= 1

    async def _admit(self, message: pb.GenerateRequest) -> Lifecycle:
        """Check everything that can be checked without a worker, and start the request. Raises AnabranchError."""
        accepted_at = time.monotonic()
        self._check_open()
        client_id = client_id_of(message)
        sampling = sampling_of(message.sampling, self._model.vocab_size, self._model.eos_token_ids)
        prompt = text_or_messages(message, self._model, self._config.max_prompt_chars)
        place = self._dispatcher.room.enter(message_bytes(message))
        try:
            if prompt is None:
                prompt_ids = checked_ids(message.token_ids.ids, self._model.vocab_size, self.context_limit())
            else:
                check_fits(prompt, self._model.longest_token_chars, self.context_limit())
                prompt_ids = await self._encode(prompt)
                self._check_open()
            sampling = fitted(sampling, len(prompt_ids), self.context_limit())
            place.hold_tokens(len(prompt_ids))
        except BaseException:
            place.leave()
            raise
        request = Request(
            request_id=drawn_id(),
            epoch=0,
            prompt_ids=prompt_ids,
            sampling=sampling,
            cache_salt=message.cache_salt,
        )
        return self._dispatcher.submit(request, accepted_at, client_id=client_id, place=place)

    def context_limit(self) -> ContextLimit:
        """How long a request may be: what living workers hold, or what the model was made for."""
        return self._membership.context_limit() or ContextLimit(num_tokens=self._model.max_context)

    def _check_open(self) -> None:
        if self.draining:
            raise Draining("the orchestrator is shutting down and takes no new requests")
        if (missing := self._membership.missing()) is not None:
            raise missing

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        self.num_encoding += 1
        try:
            ids = tuple(await self._encoder.encode(prompt))
        finally:
            self.num_encoding -= 1
        if not ids:
            raise InvalidRequest("has no tokens", "prompt")
        return ids

    # Tokenize, GetModel -----------------------------------------------------------------------------------

    async def tokenize(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        prompt = text_or_messages(message, self._model, self._config.max_prompt_chars)
        assert prompt is not None
        place = self._dispatcher.room.enter(message_bytes(message))
        try:
            return pb.TokenizeResponse(token_ids=await self._encode(prompt))
        finally:
            place.leave()

    async def get_model(self, message: pb.GetModelRequest) -> pb.Model:
        return model_message(self._model, self.context_limit().num_tokens, self._membership.members)
