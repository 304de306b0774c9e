"""What the launcher asks the gateway: are you serving, who is registered; and tells it: this process ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from anabranch.errors import MalformedMessage
from anabranch_client import Admin, Client, ClientError

PROBE_TIMEOUT_S = 2.0

T = TypeVar("T")


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the orchestrator's endpoints file that the launcher reads.

    Attributes:
        grpc: `host:port` of the gateway, the port that the system chose included.
        admin_token_file: holds the token that Admin wants to see.
    """

    grpc: str
    admin_token_file: str


class GatewayProbe:
    """A connection to the gateway that never raises for a gateway that is not there yet."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoint = endpoints.grpc
        self._client = Client(endpoints.grpc)
        self._admin = Admin(endpoints.grpc, token_file=endpoints.admin_token_file)

    @classmethod
    def from_file(cls, path: Path) -> GatewayProbe:
        """Connect to the endpoint that the orchestrator wrote. Raises MalformedMessage, ClientError."""
        try:
            return cls(msgspec.json.decode(path.read_bytes(), type=Endpoints))
        except msgspec.DecodeError as error:
            raise MalformedMessage(f"endpoints file {path}: {error}") from None

    def serving(self) -> bool:
        """Whether gRPC health says SERVING."""
        return _or_default(lambda: self._client.health(timeout_s=PROBE_TIMEOUT_S) == "serving", False)

    def worker_pids(self) -> dict[str, int]:
        """Process ids of the registered workers, by name."""
        return _or_default(
            lambda: {worker.name: worker.pid for worker in self._admin.cluster(timeout_s=PROBE_TIMEOUT_S).workers}, {}
        )

    def report_exit(self, worker: str, pid: int, how: str, timeout_s: float) -> None:
        """Say that a worker's process ended; a gateway that is gone does not mind."""
        _or_default(lambda: self._admin.report_exit(worker, pid, how, timeout_s=timeout_s), None)

    def close(self) -> None:
        self._admin.close()
        self._client.close()


def _or_default(call: Callable[[], T], default: T) -> T:
    try:
        return call()
    except ClientError:
        return default
