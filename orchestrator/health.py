"""The standard gRPC health service, kept in step with whether a request could be served.

The servicer of grpcio-health-checking writes to a watcher under the lock that a change of status needs, so that one
watcher that does not read holds the status for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

OVERALL = ""

_Response = health_pb2.HealthCheckResponse


class HealthCheckRequest(Protocol):
    """The message, whose generated class has no types."""

    service: str


_Context = grpc.aio.ServicerContext[HealthCheckRequest, Message]


class HealthReporter(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One status for the server and its services, computed from a predicate when it is asked for.

    Args:
        services: names that share the status, beside the overall one.
        serving: read at each call, and for watchers each time that `changed` was called.
    """

    def __init__(self, services: tuple[str, ...], serving: Callable[[], bool]) -> None:
        self._services = frozenset((OVERALL, *services))
        self._serving = serving
        self._news = asyncio.Event()

    def changed(self) -> None:
        """Let watchers look again."""
        self._news.set()
        self._news = asyncio.Event()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if self._serving() else _Response.NOT_SERVING)

    async def Check(self, request: HealthCheckRequest, context: _Context) -> Message:
        """The status now; NOT_FOUND for a service that is not here."""
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        answer: Message = _Response(status=status)
        return answer

    async def Watch(self, request: HealthCheckRequest, context: _Context) -> None:
        """The status, and again whenever it has changed, until the client goes."""
        told = None
        while True:
            news = self._news
            status = self._status(request.service)
            if status != told:
                await context.write(_Response(status=status))
                told = status
            await news.wait()
