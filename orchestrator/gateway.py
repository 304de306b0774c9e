"""The Inference service over gRPC: gives clients' requests to the intake, and answers out at the pace they read.

A call's life: parsed -> accepted by the `Intake` -> its events are written until the end.
Each write waits for the client to have room; a client that makes none for `client_stall_s` loses its request
(`CallGuard`).
A call that goes away, whenever that is, stops its request.
"""

from __future__ import annotations

import logging
from functools import partial

import grpc
import grpc.aio
from google.protobuf.message import Message

from anabranch.errors import AnabranchError, CapacityError, InvalidRequest, RequestCancelled
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.admission import check_num_ids
from orchestrator.answer import Finished
from orchestrator.calls import abort, answered
from orchestrator.events import accepted_event, answer_event, model_message
from orchestrator.generation import Generation
from orchestrator.intake import Intake
from orchestrator.membership import Membership
from orchestrator.parsing import parser
from orchestrator.request_message import message_bytes, prompt_of, submission_of
from orchestrator.served_model import ServedModel

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_GenerateContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateEvent]


class Gateway:
    """Serves `anabranch.v1.Inference`."""

    def __init__(self, model: ServedModel, intake: Intake, membership: Membership) -> None:
        self._model = model
        self._intake = intake
        self._membership = membership
        self.num_calls = 0

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
        check = partial(check_num_ids, limit=self._intake.context_limit())
        return parser(pb.GenerateRequest, check)(data)

    # Generate ---------------------------------------------------------------------------------------------

    async def generate(self, message: pb.GenerateRequest | InvalidRequest, context: _GenerateContext) -> None:
        """Accepted, Tokens..., Finished; or a status with the error's code."""
        generation: Generation | None = None
        self.num_calls += 1
        try:
            if isinstance(message, InvalidRequest):
                raise message
            generation = await self._intake.accept(submission_of(message, context.time_remaining()))
            await context.write(accepted_event(generation.request_id, generation.num_prompt_tokens))
            part = None
            while not isinstance(part, Finished):
                part = await generation.next()
                await context.write(answer_event(part, include_timings=message.include_timings))
        except AnabranchError as error:
            if generation is not None:
                generation.leave(error)
            if isinstance(error, CapacityError):
                self._intake.set_retry_time(error)
            await abort(context, error)
        except grpc.aio.InternalError as error:
            logger.debug("a write failed, its client is gone: %s", error)
        except Exception:
            logger.exception("a Generate call failed")
            if generation is not None:
                generation.leave(AnabranchError("the gateway failed"))
            await abort(context, AnabranchError("the gateway failed; its log says why"))
        finally:
            if generation is not None:
                generation.leave(RequestCancelled("the client went away"))
            self.num_calls -= 1

    # Tokenize, GetModel -----------------------------------------------------------------------------------

    async def tokenize(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        prompt = prompt_of(message)
        assert prompt is not None
        return pb.TokenizeResponse(token_ids=await self._intake.tokenize(prompt, message_bytes(message)))

    async def get_model(self, message: pb.GetModelRequest) -> pb.Model:
        return model_message(self._model, self._intake.context_limit().num_tokens, self._membership.members)
