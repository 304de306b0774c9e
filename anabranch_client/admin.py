"""The operator's client: who is in the cluster, who died, who shall leave. Answered on the same machine alone."""

from __future__ import annotations

from types import TracebackType

import grpc

from anabranch_client import convert
from anabranch_client.calls import channel_options, endpoint_of, timeout_of, timeout_or
from anabranch_client.client import call
from anabranch_client.types import Cluster
from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc


class Admin:
    """Operates one Anabranch cluster; safe to share between threads.

    Args:
        endpoint: the orchestrator's gRPC address.
        call_timeout_s: deadline of each call.

    Raises:
        InvalidRequest: call_timeout_s is not above 0 and at most a day, as for each call's own; or the endpoint is
            none.
    """

    def __init__(self, endpoint: str, *, call_timeout_s: float = 10.0) -> None:
        self._call_timeout_s = timeout_of("call_timeout_s", call_timeout_s)
        self._channel = grpc.insecure_channel(endpoint_of(endpoint), options=channel_options())
        self._stub = pb_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """Workers, departures and requests in flight. Raises ClientError."""
        request = pb.GetClusterRequest()
        return convert.from_cluster(call(self._stub.GetCluster, request, timeout_or(timeout_s, self._call_timeout_s)))

    def report_exit(self, worker: str, pid: int, how: str, *, timeout_s: float | None = None) -> bool:
        """Say that a worker's process has ended; its requests end at once.

        Returns:
            Whether a living worker of that name and pid was registered. Raises ClientError.
        """
        request = pb.ReportExitRequest(worker=worker, pid=pid, how=how)
        response: pb.ReportExitResponse = call(
            self._stub.ReportExit, request, timeout_or(timeout_s, self._call_timeout_s)
        )
        return response.known

    def drain(self, worker: str, *, timeout_s: float | None = None) -> None:
        """Let a worker finish what runs and exit. Raises ClientError (InvalidRequest for an unknown name)."""
        call(self._stub.Drain, pb.DrainRequest(worker=worker), timeout_or(timeout_s, self._call_timeout_s))

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Admin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
