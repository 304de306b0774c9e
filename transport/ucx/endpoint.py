"""How a UCX endpoint begins and ends. Each link has a UCX worker of its own, so its end releases all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from anabranch.errors import MalformedMessage, TransportUnavailable
from transport.ucx.api import UcxEndpoint, UcxRequest, UcxWorker, forget_cancelled, load

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 1.0


def open_endpoint(worker: UcxWorker, peer_address: bytes, peer: str) -> UcxEndpoint:
    """A worker's endpoint to another one, by the UCX address of that.

    UCX ends the process where the address has another format than its own: it must come from one who may connect.

    Raises:
        MalformedMessage: there is no address.
        TransportUnavailable: UCX finds no way to the peer.
    """
    if not peer_address:
        raise MalformedMessage(f"{peer} sent no UCX address")
    core = load()
    try:
        address = core.UCXAddress.create_from_buffer(bytearray(peer_address))
        endpoint: UcxEndpoint = core.UCXEndpoint.create_from_worker_address(worker, address, True)
    except core.UCXError as error:
        raise TransportUnavailable(
            f"UCX finds no transport to {peer}: {error}; between hosts set listen_host on both ends, "
            "within a host both ends must see the same shared memory, or use tcp"
        ) from error
    return endpoint


def close_endpoint(
    endpoint: UcxEndpoint, worker: UcxWorker, requests: Sequence[UcxRequest], tags: Sequence[object], peer: str
) -> None:
    """Close an endpoint and wait until UCX has let go of every buffer, for at most DRAIN_TIMEOUT_S.

    UCX's worker is freed with the last that holds on to it, to its endpoint or to a request.

    Args:
        requests: what UCX works on.
        tags: of messages that may have come and that nobody has asked for.
    """
    # After an error UCX has closed the endpoint itself, and must not be asked again.
    if endpoint.alive:
        endpoint.close_blocking()
    left = list(requests)
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    # Messages that nobody asked for are taken into one byte each: ucxx would receive them as a whole, into memory of
    # its own, when it frees the worker.
    scratch = load().Array(np.empty(1, np.uint8))
    for tag in tags:
        while worker.tag_probe(tag).matched and time.monotonic() < deadline:
            left.append(worker.tag_recv(scratch, tag))
    while not all(request.completed for request in left):
        worker.progress()
        if time.monotonic() > deadline:
            logger.error("%s: UCX holds on to %d requests", peer, sum(not request.completed for request in left))
            break
    forget_cancelled(endpoint)
