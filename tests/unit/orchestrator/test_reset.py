"""Resetting a call reaches into grpcio, so what happens where it does not work is held too."""

import grpc
from grpc._cython import cygrpc

from orchestrator.reset import reset


class Alien:
    """A context of another grpcio."""


class Deaf:
    def peer_identity_key(self) -> None:
        return None


def test_it_says_that_a_call_was_not_reset(caplog):
    original = cygrpc.peer_identity_key
    for context in (Alien(), Deaf()):
        caplog.clear()
        assert not reset(context, grpc.StatusCode.CANCELLED, "why")
        assert cygrpc.peer_identity_key is original
        assert "cannot reset a call" in caplog.text
