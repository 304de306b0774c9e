"""The Admin service: who is in the cluster, who died, who shall leave.

Answered to this machine alone, and there to those alone who show the token (metadata `authorization: Bearer TOKEN`),
which is in a file that only the orchestrator's user can read.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from anabranch.errors import AccessDenied, AnabranchError, InvalidRequest, shown
from anabranch.system.clock import loop_clock
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.calls import abort, answered
from orchestrator.dispatcher import Dispatcher
from orchestrator.events import departure_message, worker_event_message, worker_message
from orchestrator.ffn_scale import FfnScale
from orchestrator.intake import Intake
from orchestrator.member import Member
from orchestrator.membership import Membership
from orchestrator.parsing import parser

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name
MAX_HOW_CHARS = 200
REMEDY = (
    "give the client token_file, or the environment ANABRANCH_ADMIN_TOKEN_FILE: the admin_token_file that the "
    "orchestrator logs at its start and writes to its --endpoints-file, and `anabranch up` to its --ready-file"
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Context = grpc.aio.ServicerContext[_Request, _Response]
_Handler = Callable[[_Request | InvalidRequest, _Context[_Request, _Response]], Awaitable[_Response]]


def is_local(peer: str) -> bool:
    """Whether gRPC's name of a peer (`ipv4:127.0.0.1:5000`, `unix:`) is on this machine."""
    return peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D"))


class Admin:
    """Serves `anabranch.v1.Admin`.

    Args:
        token: what every caller must show.
    """

    def __init__(
        self, membership: Membership, dispatcher: Dispatcher, intake: Intake, ffn_scale: FfnScale, token: bytes
    ) -> None:
        self._authorization = b"Bearer " + token
        self._membership = membership
        self._dispatcher = dispatcher
        self._intake = intake
        self._ffn_scale = ffn_scale

    def handlers(self) -> grpc.GenericRpcHandler[Message, Message]:
        """What the gRPC server calls."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetCluster": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.get_cluster),
                    request_deserializer=parser(pb.GetClusterRequest),
                    response_serializer=pb.Cluster.SerializeToString,
                ),
                "ReportExit": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.report_exit),
                    request_deserializer=parser(pb.ReportExitRequest),
                    response_serializer=pb.ReportExitResponse.SerializeToString,
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.drain),
                    request_deserializer=parser(pb.DrainRequest),
                    response_serializer=pb.DrainResponse.SerializeToString,
                ),
                "Cordon": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.cordon),
                    request_deserializer=parser(pb.CordonRequest),
                    response_serializer=pb.CordonResponse.SerializeToString,
                ),
                "Uncordon": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.uncordon),
                    request_deserializer=parser(pb.UncordonRequest),
                    response_serializer=pb.UncordonResponse.SerializeToString,
                ),
                "Events": grpc.unary_stream_rpc_method_handler(
                    self.events,
                    request_deserializer=parser(pb.EventsRequest),
                    response_serializer=pb.WorkerEvent.SerializeToString,
                ),
                "ScaleFfn": grpc.unary_unary_rpc_method_handler(
                    self._guarded(self.scale_ffn),
                    request_deserializer=parser(pb.ScaleFfnRequest),
                    response_serializer=pb.ScaleFfnResponse.SerializeToString,
                ),
                "FollowFfnScale": grpc.unary_stream_rpc_method_handler(
                    self.follow_ffn_scale,
                    request_deserializer=parser(pb.FollowFfnScaleRequest),
                    response_serializer=pb.FfnScale.SerializeToString,
                ),
            },
        )

    def _guarded(self, method: Callable[[_Request], Awaitable[_Response]]) -> _Handler[_Request, _Response]:
        """A handler that refuses callers on other machines, and those that do not show the token."""
        handler = answered(method)

        async def handle(message: _Request | InvalidRequest, context: _Context[_Request, _Response]) -> _Response:
            try:
                self._check(context)
            except AccessDenied as error:
                await abort(context, error)
                raise
            return await handler(message, context)

        return handle

    def _check(self, context: _Context[_Request, _Response]) -> None:
        metadata: Iterable[tuple[str, str | bytes]] | None = context.invocation_metadata()
        if not is_local(context.peer()):
            raise AccessDenied("the Admin service answers on its own machine only")
        shown = [value for key, value in metadata or () if key == "authorization"]
        if not shown:
            raise AccessDenied(f"the call shows no admin token; {REMEDY}")
        data = shown[0].encode() if isinstance(shown[0], str) else shown[0]
        if len(shown) > 1 or not hmac.compare_digest(data, self._authorization):
            raise AccessDenied(f"the admin token is not this orchestrator's; {REMEDY}")

    async def get_cluster(self, message: pb.GetClusterRequest) -> pb.Cluster:
        now = loop_clock().now()
        return pb.Cluster(
            workers=[worker_message(member, now) for member in self._membership.members],
            departures=[departure_message(departure) for departure in self._membership.departures],
            num_requests=self._dispatcher.num_requests,
            num_queued=len(self._dispatcher.queue),
            serving=self._membership.serving and not self._intake.draining,
            draining=self._intake.draining,
        )

    async def report_exit(self, message: pb.ReportExitRequest) -> pb.ReportExitResponse:
        member = self._membership.by_name(message.worker)
        if member is None or member.info.pid != message.pid:
            return pb.ReportExitResponse(known=False)
        self._membership.lose(member, message.how[:MAX_HOW_CHARS] or "its parent says that it has ended")
        return pb.ReportExitResponse(known=True)

    async def drain(self, message: pb.DrainRequest) -> pb.DrainResponse:
        await self._membership.drain(self._living(message.worker))
        return pb.DrainResponse()

    async def cordon(self, message: pb.CordonRequest) -> pb.CordonResponse:
        self._membership.cordon(self._living(message.worker))
        return pb.CordonResponse()

    async def uncordon(self, message: pb.UncordonRequest) -> pb.UncordonResponse:
        self._membership.uncordon(self._living(message.worker))
        return pb.UncordonResponse()

    def _living(self, name: str) -> Member:
        member = self._membership.by_name(name)
        if member is None:
            names = ", ".join(member.name for member in self._membership.members) or "there are none"
            raise InvalidRequest(f"{shown(name)} is no living worker ({names})", "worker")
        return member

    async def events(
        self, message: pb.EventsRequest | InvalidRequest, context: _Context[pb.EventsRequest, pb.WorkerEvent]
    ) -> None:
        try:
            self._check(context)
            if isinstance(message, InvalidRequest):
                raise message
            async with aclosing(self._membership.log.follow(message.first)) as events:
                async for num_missed, event in events:
                    await context.write(worker_event_message(num_missed, event))
        except AnabranchError as error:
            await abort(context, error)

    async def scale_ffn(self, message: pb.ScaleFfnRequest) -> pb.ScaleFfnResponse:
        self._ffn_scale.ask(message.workers)
        return pb.ScaleFfnResponse()

    async def follow_ffn_scale(
        self,
        message: pb.FollowFfnScaleRequest | InvalidRequest,
        context: _Context[pb.FollowFfnScaleRequest, pb.FfnScale],
    ) -> None:
        try:
            self._check(context)
            if isinstance(message, InvalidRequest):
                raise message
            async with aclosing(self._ffn_scale.follow(message.max_workers)) as numbers:
                async for workers in numbers:
                    await context.write(pb.FfnScale(workers=workers))
        except AnabranchError as error:
            await abort(context, error)
