"""Whether UCX really moves bytes here: one transfer between two workers of this process.

That UCX can be imported and lists a transport does not say so: with a read-only or tiny /dev/shm it fails only when
a worker or an endpoint is made, which would be at the first request.
"""

from __future__ import annotations

import os
import time
from functools import cache

import numpy as np

from anabranch.errors import TransportUnavailable
from transport.ucx.api import UcxEndpoint, load, make_context, make_worker
from transport.ucx.endpoint import open_endpoint

# Beyond what travels with its announcement: the way that payloads take.
NUM_BYTES = 64 * 1024
TIMEOUT_S = 5.0
SHM = "/dev/shm"
# Below it UCX's POSIX shared memory counts as absent (UCX_POSIX_SHM_MIN_SIZE).
MIN_SHM_BYTES = 16 << 20


@cache
def failure(transports: str) -> str:
    """Why UCX moves nothing over these transports (UCX_TLS); empty where it does. Tried once in a process."""
    try:
        _transfer(transports)
    except Exception as error:  # a broken UCX fails in many ways; all of them mean: not usable
        return f"UCX moves nothing over {transports}: {error}"
    return ""


def shm_remedy(option: str) -> str:
    """What to do about shared memory, as it is here, or else with the option that asked for UCX."""
    otherwise = f"or set {option}: tcp"
    try:
        found = os.statvfs(SHM)
    except OSError:
        return f"there is no {SHM}: mount a tmpfs there, {otherwise}"
    if found.f_flag & os.ST_RDONLY:
        return f"{SHM} is read-only: mount it writable, {otherwise}"
    if not os.access(SHM, os.W_OK | os.X_OK):
        return f"{SHM} is not writable for this user: chmod 1777 {SHM}, {otherwise}"
    if found.f_bavail * found.f_frsize < MIN_SHM_BYTES:
        free = f"{SHM} has less than {MIN_SHM_BYTES >> 20} MiB free"
        return f"{free}: make it larger (containers: --shm-size=1g), {otherwise}"
    return f"see that both ends share {SHM} and the process namespace, {otherwise}"


def _transfer(transports: str) -> None:
    """Send bytes one way and compare them. Raises UCX's errors, TransportUnavailable."""
    core = load()
    # A context each, or UCX would see that both are one process and take its own memory.
    near, far = (make_worker(make_context(transports)) for _ in range(2))
    endpoints: list[UcxEndpoint] = []
    tag = core.UCXXTag(1)
    sent, received = np.arange(NUM_BYTES, dtype=np.uint8), np.zeros(NUM_BYTES, np.uint8)
    try:
        for worker, peer in ((near, far), (far, near)):
            endpoints.append(open_endpoint(worker, peer.address.tobytes(), "this process"))
        requests = [endpoints[0].tag_send(core.Array(sent), tag), endpoints[1].tag_recv(core.Array(received), tag)]
        deadline = time.monotonic() + TIMEOUT_S
        while not all(request.completed for request in requests):
            near.progress()
            far.progress()
            if time.monotonic() > deadline:
                raise TransportUnavailable(f"{NUM_BYTES} bytes did not arrive within {TIMEOUT_S:g} s")
        for request in requests:
            request.check_error()
    finally:
        for endpoint in endpoints:
            endpoint.close_blocking()
    if not np.array_equal(sent, received):
        raise TransportUnavailable("other bytes arrived than were sent")
