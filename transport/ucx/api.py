"""What is used of ucxx: its core objects, configured for this project, imported at first use.

Endpoints have error handling on. Left to itself UCX then avoids shared memory, because its shared-memory
transports do not announce that they can tell a dead peer; two options make them say so, and keep the
single-copy path (CMA). With error handling off UCX takes the same path but ends the whole process when the
other one dies in the middle of a transfer. A peer that dies without a transfer is noticed by the
socket that joined the two ends.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from anabranch.errors import TransportUnavailable
from anabranch.system.hosts import is_loopback

# Within a host no UCX transport listens on a socket; between hosts the operator has named an interface. Never SysV:
# its segments have mode 0660, so that another user of the group can read the KV in them; POSIX ones have 0600 and no
# name. UCX's `shm` and `all` mean both.
HOST_TRANSPORTS = "posix,cma,self"
NETWORK_TRANSPORTS = "^sysv"

Bytes = npt.NDArray[np.uint8]

_OPTIONS = {
    "POSIX_ERROR_HANDLING": "y",
    "CMA_MEMORY_INVALIDATE": "y",
    # Payloads go by rendezvous: nothing is buffered at a receiver that has not asked for it.
    "RNDV_THRESH": "8192",
    "RNDV_FRAG_MEM_TYPE": "host",
    "MEMTYPE_CACHE": "n",
}


@dataclass(frozen=True, kw_only=True)
class UcxTags:
    """The two sequences of messages of a link, each of which UCX keeps in order."""

    envelopes: object
    payloads: object


class UcxRequest(Protocol):
    """A transfer that UCX works on. Let go of before its end, it is cancelled."""

    @property
    def completed(self) -> bool: ...

    def check_error(self) -> None: ...


class UcxProbe(Protocol):
    @property
    def matched(self) -> bool: ...


class UcxAddress(Protocol):
    def tobytes(self) -> bytes: ...


class UcxWorker(Protocol):
    @property
    def address(self) -> UcxAddress: ...

    @property
    def epoll_file_descriptor(self) -> int: ...

    def init_blocking_progress_mode(self) -> None: ...

    def progress(self) -> None: ...

    def arm(self) -> bool: ...

    def tag_probe(self, tag: object) -> UcxProbe: ...

    def tag_recv(self, array: object, tag: object) -> UcxRequest: ...


class UcxEndpoint(Protocol):
    @property
    def ucxx_ptr(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    def tag_send(self, array: object, tag: object) -> UcxRequest: ...

    def tag_recv(self, array: object, tag: object) -> UcxRequest: ...

    def close_blocking(self) -> None: ...


@cache
def load() -> ModuleType:
    """ucxx's core module. Raises TransportUnavailable."""
    # UCX warns on stderr about the variable that ucxx itself sets; only the environment can tell it not to.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    # Its log goes to the standard output otherwise, into what programs read.
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    try:
        import ucxx._lib.libucxx as core
        from ucxx._lib.arr import Array
    except (ImportError, OSError) as error:
        raise TransportUnavailable(f"ucxx cannot be imported: {error}") from error
    core.Array = Array
    module: ModuleType = core
    return module


def make_context(transports: str) -> object:
    """A UCX context for tagged messages. Raises TransportUnavailable."""
    core = load()
    try:
        return core.UCXContext({"TLS": transports, **_OPTIONS}, (core.Feature.TAG, core.Feature.WAKEUP))
    except core.UCXError as error:
        raise TransportUnavailable(f"UCX does not start with transports {transports}: {error}") from error


def make_worker(context: object) -> UcxWorker:
    """A UCX worker whose events can be waited for. Raises TransportUnavailable."""
    core = load()
    try:
        worker: UcxWorker = core.UCXWorker(context)
        worker.init_blocking_progress_mode()
    except core.UCXError as error:  # each has shared memory of its own, which may have run out
        raise TransportUnavailable(f"UCX makes no worker: {error}; see the space in /dev/shm") from error
    return worker


def forget_cancelled(endpoint: UcxEndpoint) -> None:
    """Let go of those requests that were under way when an endpoint was closed and that have ended since.

    ucxx keeps them in a list of the endpoint that it looks through in `getCancelingSize` alone, which nobody calls
    where there is no progress thread of its own; until then they hold the endpoint, and with it the worker.
    """
    _canceling_size()(endpoint.ucxx_ptr)


@cache
def _canceling_size() -> Callable[[int], int]:
    """`size_t ucxx::Endpoint::getCancelingSize() const`."""
    load()
    try:
        function = ctypes.CDLL("libucxx.so")._ZNK4ucxx8Endpoint16getCancelingSizeEv
    except (OSError, AttributeError):
        return lambda endpoint: 0  # another ucxx: what was under way may be kept
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return function


def transports_for(listen_host: str) -> str:
    """UCX's transports (UCX_TLS) for an end that listens there."""
    return HOST_TRANSPORTS if is_loopback(listen_host) else NETWORK_TRANSPORTS


def describe() -> str:
    """UCX's and ucxx's versions. Raises TransportUnavailable."""
    load()  # sets what UCX reads from the environment when it is loaded, so it must be the first to load it
    import ucxx

    version = ".".join(str(part) for part in ucxx.get_ucx_version())
    return (
        f"UCX {version}, ucxx {ucxx.__version__}; {HOST_TRANSPORTS} within a host, {NETWORK_TRANSPORTS} between hosts"
    )
