"""Every error of the tree has a gRPC status of its own: INTERNAL is for bugs alone."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from anabranch import errors
from orchestrator.calls import _status_of

pytestmark = pytest.mark.unit


def below(kind: type[errors.AnabranchError]) -> Iterator[type[errors.AnabranchError]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


@pytest.mark.parametrize("kind", [k for k in below(errors.AnabranchError) if k.__module__ == "anabranch.errors"])
def test_no_named_error_is_internal(kind: type[errors.AnabranchError]) -> None:
    error = kind.__new__(kind)
    assert _status_of(error) is not grpc.StatusCode.INTERNAL
    assert _status_of(errors.AnabranchError("a bug")) is grpc.StatusCode.INTERNAL


def test_what_goes_wrong_between_workers_may_be_tried_again() -> None:
    for kind in (errors.ChecksumMismatch, errors.MalformedMessage, errors.StaleLease, errors.PeerLost):
        assert _status_of(kind("x")) is grpc.StatusCode.UNAVAILABLE
