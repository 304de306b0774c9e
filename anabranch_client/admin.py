"""The operator's client: who is in the cluster, who died, who shall leave.

Answered on the same machine alone, and to those alone who show the orchestrator's admin token. The token is read from
a file, so that it is on no command line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

import grpc

from anabranch_client import convert
from anabranch_client.calls import MAX_TIMEOUT_S, channel_options, endpoint_of, timeout_of, timeout_or
from anabranch_client.client import call, mapped
from anabranch_client.errors import InvalidRequest, Unavailable
from anabranch_client.types import Cluster, WorkerEvent
from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc

TOKEN_FILE_VARIABLE = "ANABRANCH_ADMIN_TOKEN_FILE"
MAX_TOKEN_BYTES = 1024

_Response = TypeVar("_Response")


class Admin:
    """Operates one Anabranch cluster; safe to share between threads.

    Args:
        endpoint: the orchestrator's gRPC address.
        token_file: holds the admin token; the orchestrator names it in its endpoints file, `anabranch up` in its
            ready file (`admin_token_file`). None: `$ANABRANCH_ADMIN_TOKEN_FILE`.
        call_timeout_s: deadline of each call.

    Raises:
        InvalidRequest: the token cannot be read; call_timeout_s is not above 0 and at most a day, as for each call's
            own; or the endpoint is none. Without a token, each call raises AccessDenied.
    """

    def __init__(
        self, endpoint: str, *, token_file: str | os.PathLike[str] | None = None, call_timeout_s: float = 10.0
    ) -> None:
        self._call_timeout_s = timeout_of("call_timeout_s", call_timeout_s)
        token_file = token_file or os.environ.get(TOKEN_FILE_VARIABLE)
        self._metadata = [("authorization", f"Bearer {_read_token(token_file)}")] if token_file else []
        self._channel = grpc.insecure_channel(endpoint_of(endpoint), options=channel_options())
        self._stub = pb_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """Workers, departures and requests in flight. Raises ClientError."""
        request = pb.GetClusterRequest()
        return convert.from_cluster(self._call(self._stub.GetCluster, request, timeout_s))

    def report_exit(self, worker: str, pid: int, how: str, *, timeout_s: float | None = None) -> bool:
        """Say that a worker's process has ended; its requests go on elsewhere at once.

        Returns:
            Whether a living worker of that name and pid was registered. Raises ClientError.
        """
        request = pb.ReportExitRequest(worker=worker, pid=pid, how=how)
        response: pb.ReportExitResponse = self._call(self._stub.ReportExit, request, timeout_s)
        return response.known

    def drain(self, worker: str, *, timeout_s: float | None = None) -> None:
        """Let a worker finish what runs and exit. Raises ClientError (InvalidRequest for an unknown name)."""
        self._call(self._stub.Drain, pb.DrainRequest(worker=worker), timeout_s)

    def cordon(self, worker: str, *, timeout_s: float | None = None) -> None:
        """Give a worker no new requests; those that it has go on, and `uncordon` takes it back.

        Raises:
            ClientError: InvalidRequest for an unknown name, an ffn worker, or one that drains.
        """
        self._call(self._stub.Cordon, pb.CordonRequest(worker=worker), timeout_s)

    def uncordon(self, worker: str, *, timeout_s: float | None = None) -> None:
        """Let a worker take requests again.

        Raises:
            ClientError: InvalidRequest for an unknown name, or one that drains.
        """
        self._call(self._stub.Uncordon, pb.UncordonRequest(worker=worker), timeout_s)

    def events(self, first: int = 0, *, timeout_s: float = MAX_TIMEOUT_S) -> Iterator[WorkerEvent]:
        """What happened to workers, and then what happens.

        Args:
            first: sequence number of the first one wanted; 0: the oldest that the orchestrator keeps.
            timeout_s: after which the stream ends with DeadlineExceeded; go on with the last sequence number + 1.

        Raises (from iteration, also once this is closed):
            ClientError: InvalidRequest for a number that has not been reached, as after a start of the orchestrator.
        """
        request = self._message(pb.EventsRequest, first=first)
        for event in self._stream(self._stub.Events, request, timeout_s):
            yield convert.from_worker_event(event)

    def scale_ffn(self, workers: int, *, timeout_s: float | None = None) -> None:
        """Ask for so many FFN workers, and return; `cluster` shows who has come and gone. Requests go on meanwhile.

        Whoever started the cluster (`anabranch up`) starts more, or drains the youngest.

        Raises:
            ClientError: InvalidRequest for less than 1, for more than 256 or than the machine has memory for, for
                fewer than can hold all experts, without FFN workers, and where nobody starts workers.
        """
        self._call(self._stub.ScaleFfn, self._message(pb.ScaleFfnRequest, workers=workers), timeout_s)

    def follow_ffn_scale(self, max_workers: int, *, timeout_s: float = MAX_TIMEOUT_S) -> Iterator[int]:
        """For who starts workers: how many FFN workers there shall be, now (0: nobody has asked) and later.

        Args:
            max_workers: most that this machine has room for; more are refused to those who ask.
            timeout_s: after which the stream ends with DeadlineExceeded; follow again.

        Raises (from iteration, also once this is closed): ClientError.
        """
        request = self._message(pb.FollowFfnScaleRequest, max_workers=max_workers)
        for scale in self._stream(self._stub.FollowFfnScale, request, timeout_s):
            yield scale.workers

    def _stream(
        self, method: Callable[..., Iterator[_Response]], request: object, timeout_s: float
    ) -> Iterator[_Response]:
        timeout_s = timeout_of("timeout_s", timeout_s)
        try:
            yield from method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise mapped(error) from None
        except ValueError as error:
            # What gRPC says of a channel that is closed.
            raise Unavailable(str(error), code="closed") from None

    @staticmethod
    def _message(kind: Callable[..., _Response], **fields: int) -> _Response:
        try:
            return kind(**fields)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{', '.join(fields)}: {error}", code="invalid_request") from None

    def _call(self, method: Callable[..., _Response], request: object, timeout_s: float | None) -> _Response:
        return call(method, request, timeout_or(timeout_s, self._call_timeout_s), self._metadata)

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Admin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file. Raises InvalidRequest, without a word of what the file holds."""
    remedy = "give the admin_token_file that the orchestrator's endpoints file or `anabranch up`'s ready file names"
    try:
        # A FIFO would let the opener wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            token = file.read(MAX_TOKEN_BYTES + 1).strip().decode("ascii")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no token"
        raise InvalidRequest(f"token_file: {os.fspath(path)!r}: {reason}; {remedy}", code="invalid_request") from None
    if not token or len(token) > MAX_TOKEN_BYTES or not token.isprintable():
        raise InvalidRequest(f"token_file: {os.fspath(path)!r}: it holds no token; {remedy}", code="invalid_request")
    return token
