"""The standard gRPC health service, kept in step with whether a request could be served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

OVERALL = ""


class HealthReporter:
    """Sets the overall status and the service's from one predicate.

    Args:
        services: names that share the status, beside the overall one.
        serving: read each time that `changed` was called.
    """

    def __init__(self, services: tuple[str, ...], serving: Callable[[], bool]) -> None:
        self.servicer = health_aio.HealthServicer()
        self._services = (OVERALL, *services)
        self._serving = serving
        self._news = asyncio.Event()
        self._news.set()

    def changed(self) -> None:
        self._news.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self.report()

    async def report(self) -> None:
        """Set the status to what holds now."""
        status = health_pb2.HealthCheckResponse.SERVING
        if not self._serving():
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)
