"""Ranks of one host over shared memory.

Rank 0 makes a segment without a name (a memfd), so nothing is left behind however the ranks end. The others
open it through its owner's `/proc/PID/fd`, which the kernel allows to processes of the same user alone.
Collectives copy through slots in the segment and count steps there; transfers are moved by a helper thread
(see `native/`). A dead rank is noticed through its pidfd, a stalled one by the deadline.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import logging
import os
import secrets
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from anabranch.errors import AnabranchError, ConfigError, DeadlineExceeded, PeerLost, TransportError
from anabranch.parallel.exchange import check_post
from anabranch.parallel.group import NativeReduce
from anabranch.parallel.mesh import MAX_RANKS
from transport.collectives.arena import Arena
from transport.collectives.base import COLLECTIVE_TIMEOUT_S
from transport.collectives.build import load_library
from transport.collectives.rendezvous import Patience, check_folder, leave_ticket, read_ticket
from transport.collectives.segment import TOKEN_BYTES, Ticket, make_segment, open_segment

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
SPIN_S = 200e-6
ARENA_BYTES = 1 << 30  # of address space for each rank: memory is taken only for buffers that are made
_REASON_BYTES = 512
_DEADLINE, _PEER_LOST, _DISAGREE = 1, 2, 3
_ERRORS: dict[int, type[AnabranchError]] = {
    _DEADLINE: DeadlineExceeded,
    _PEER_LOST: PeerLost,
    _DISAGREE: TransportError,
}
_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
}


class ShmGroup:
    """One rank of a group in shared memory; a `CollectiveGroup` for CPU tensors.

    One thread at a time may call collectives, and one (the same or another) may post and wait for transfers.
    Sums go in rank order in float32 and are rounded once, so all ranks get the same bits, however long the
    tensor is. Collectives write through raw pointers and are unknown to autograd.
    """

    backend = "shm"

    def __init__(self, *, name: str, rank: int, size: int, native: int, collective_timeout_s: float) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.collective_timeout_s = collective_timeout_s
        self._num_splits = 0
        self._library = library = load_library()
        self._native = native
        self._all_reduce = library.anabranch_all_reduce
        # Tensors that native code may still touch.
        self._transfers: dict[int, tuple[torch.Tensor, ...]] = {}
        self._arena = Arena(
            library.anabranch_arena(native),
            ARENA_BYTES,
            library.anabranch_populate,
            lambda: library.anabranch_unmap(native),
        )
        self._pidfds: list[int] = []
        # Also runs when the interpreter ends: a rank that leaves cleanly is not taken for a dead one.
        self._finalizer = weakref.finalize(
            self,
            _close,
            library.anabranch_close,
            library.anabranch_free,
            native,
            self._pidfds,
            self._transfers,
            self._arena,
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in x's memory where x is contiguous.

        Raises:
            ValueError: not a CPU tensor of a float type, int32 or int64.
        """
        dtype = _DTYPES.get(x.dtype)
        if dtype is None or not x.is_cpu:
            raise ValueError(f"x: cannot sum {x.dtype} on {x.device} in shared memory")
        if not x.is_contiguous():
            x = x.contiguous()
        code = self._all_reduce(self._native, x.data_ptr(), x.numel(), dtype)
        if code:
            raise self._error(code)
        return x

    def native_all_reduce(self, x: torch.Tensor) -> NativeReduce | None:
        """See `NativeGroup.native_all_reduce`; None for what `all_reduce` copies or refuses."""
        dtype = _DTYPES.get(x.dtype)
        if dtype is None or not x.is_cpu or not x.is_contiguous():
            return None
        function = ctypes.cast(self._all_reduce, ctypes.c_void_p).value
        assert function is not None
        return NativeReduce(function=function, handle=self._native, dtype=dtype, error=self._error)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `x`, of one shape and any dtype, joined along `dim` in rank order."""
        dim %= x.dim()
        x = x.contiguous()
        out = x.new_empty((*x.shape[:dim], x.shape[dim] * self.size, *x.shape[dim + 1 :]))
        num_rows = max(1, x.shape[:dim].numel())
        code = self._library.anabranch_all_gather(
            self._native, x.data_ptr(), out.data_ptr(), num_rows, x.nbytes // num_rows
        )
        if code:
            raise self._error(code)
        return out

    def barrier(self) -> None:
        """Return when every rank has called it."""
        code = self._library.anabranch_barrier(self._native)
        if code:
            raise self._error(code)

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> ShmHandle:
        """See `Exchange.post`; buffers from `buffer_like` are filled with a single copy, by the sender."""
        check_post(self, send, to, receive, source)
        if not all(tensor.is_cpu for tensor in (*send, *receive)):
            raise ValueError("send, receive: must be CPU tensors in shared memory")
        if not send and not receive:
            return ShmHandle(self, 0)
        sent = tuple(tensor.contiguous() for tensor in send)
        parts = array.array("Q")
        for tensor in (*sent, *receive):
            parts.extend((tensor.data_ptr(), tensor.nbytes))
        address, _ = parts.buffer_info()
        transfer = self._library.anabranch_post(self._native, address, len(sent), to, len(receive), source)
        if transfer < 0:
            raise self._error(-transfer)
        self._transfers[transfer] = (*sent, *receive)
        return ShmHandle(self, transfer)

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor like `x` in the segment; in private memory when the segment is full."""
        buffer = self._arena.tensor_like(x)
        return torch.empty_like(x, memory_format=torch.contiguous_format) if buffer is None else buffer

    def split(self, color: int) -> ShmGroup:
        """The group of the ranks that give the same `color`, in rank order; every rank calls it."""
        colors = self.all_gather(torch.tensor([color]), 0).tolist()
        members = [rank for rank, other in enumerate(colors) if other == color]
        rank, size = members.index(self.rank), len(members)
        self._num_splits += 1
        name = f"{self.name}/{self._num_splits}.{color}"
        group: ShmGroup | None = None
        with contextlib.ExitStack() as stack:
            ticket = Ticket(pid=os.getpid(), fd=-1, token=secrets.token_bytes(TOKEN_BYTES))
            if rank == 0:
                fd = _new_segment(size)
                stack.callback(os.close, fd)
                ticket = msgspec.structs.replace(ticket, fd=fd)
                group = _attach(name, rank, size, fd, ticket.token, True, self.collective_timeout_s)
            tickets = self.all_gather(torch.tensor([ticket.as_numbers()]), 0)
            if rank:
                ticket = Ticket.from_numbers(tickets[members[0]].tolist())
                group = _try_attach(ticket, name, rank, size, self.collective_timeout_s)
            if group is None:
                raise PeerLost(f"group {name}: the segment of rank {members[0]} (pid {ticket.pid}) is gone")
            _await_all(group, self.collective_timeout_s)
        return group

    def abort(self, reason: str) -> None:
        """End every wait of every rank of this group with PeerLost, now and in future."""
        self._library.anabranch_abort(self._native, reason.encode("ascii", "replace")[: _REASON_BYTES - 1])

    def close(self) -> None:
        """Leave the group; buffers that are still held stay readable. Idempotent.

        Another thread's call that is under way ends with PeerLost first, and the whole group with it.
        """
        self._finalizer()

    def _finish(self, transfer: int) -> None:
        code = self._library.anabranch_wait(self._native, transfer)
        if code:
            raise self._error(code)
        del self._transfers[transfer]

    def _error(self, code: int) -> AnabranchError:
        buffer = ctypes.create_string_buffer(_REASON_BYTES)
        if not self._library.anabranch_reason(self._native, buffer):
            return PeerLost(f"group {self.name}: this rank has closed it")
        reason = buffer.value.decode("ascii", "replace") or "the group failed"
        return _ERRORS.get(code, TransportError)(f"group {self.name}: {reason}")


class ShmHandle:
    """A posted transfer in shared memory."""

    def __init__(self, group: ShmGroup, transfer: int) -> None:
        self._group = group
        self._transfer = transfer

    def wait(self) -> None:
        """See `Handle.wait`."""
        if self._transfer:
            self._group._finish(self._transfer)
            self._transfer = 0


def join(
    *,
    rank: int,
    size: int,
    rendezvous: Path,
    name: str = "world",
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    start_timeout_s: float = START_TIMEOUT_S,
) -> ShmGroup:
    """Meet the other ranks in the folder `rendezvous` and make a group with them.

    Raises:
        TransportUnavailable: not Linux, or the library cannot be built.
        ConfigError: an unfit folder or size.
        DeadlineExceeded: a rank did not come within `start_timeout_s`; says which.
    """
    if not 1 <= size <= MAX_RANKS or not 0 <= rank < size:
        raise ConfigError("rank, size", (rank, size), f"must have 0 <= rank < size <= {MAX_RANKS}")
    check_folder(rendezvous)
    load_library()
    patience = Patience(f"group {name}: rank 0's segment", start_timeout_s)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            fd, token = _new_segment(size), secrets.token_bytes(TOKEN_BYTES)
            stack.callback(os.close, fd)
            group = _attach(name, rank, size, fd, token, True, collective_timeout_s)
            ticket = msgspec.msgpack.encode(Ticket(pid=os.getpid(), fd=fd, token=token))
            stack.callback(leave_ticket(rendezvous, f"{name}.shm", ticket).unlink, missing_ok=True)
        else:
            group = None
            while group is None:
                group = _try_ticket(rendezvous, name, rank, size, collective_timeout_s)
                if group is None:
                    patience.pause()
        assert group is not None
        _await_all(group, patience.rest_s)
    log.debug("group %s: rank %d of %d, shared memory", name, rank, size)
    return group


def _try_ticket(folder: Path, name: str, rank: int, size: int, timeout_s: float) -> ShmGroup | None:
    """Attach to what the ticket names; None while there is none, or only one of a process that ended."""
    data = read_ticket(folder, f"{name}.shm")
    if data is None:
        return None
    try:
        ticket = msgspec.msgpack.decode(data, type=Ticket)
    except msgspec.MsgspecError:
        return None
    return _try_attach(ticket, name, rank, size, timeout_s)


def _try_attach(ticket: Ticket, name: str, rank: int, size: int, timeout_s: float) -> ShmGroup | None:
    """Attach to another rank's segment, or None where it is gone or another file."""
    fd = open_segment(ticket)
    if fd is None:
        return None
    try:
        return _attach(name, rank, size, fd, ticket.token, False, timeout_s)
    finally:
        os.close(fd)


def _new_segment(size: int) -> int:
    return make_segment(load_library().anabranch_segment_bytes(size, ARENA_BYTES))


def _attach(name: str, rank: int, size: int, fd: int, token: bytes, creates: bool, timeout_s: float) -> ShmGroup | None:
    native: int | None = load_library().anabranch_attach(
        fd, rank, size, ARENA_BYTES, token, int(creates), SPIN_S, timeout_s
    )
    if native is None:
        return None
    return ShmGroup(name=name, rank=rank, size=size, native=native, collective_timeout_s=timeout_s)


def _await_all(group: ShmGroup, timeout_s: float) -> None:
    """Wait until all ranks have mapped the segment, and watch their processes from then on."""
    for other in range(group.size):
        if other == group.rank:
            continue
        pid = group._library.anabranch_await_rank(group._native, other, timeout_s)
        if pid < 0:
            error = group._error(-pid)
            group.close()
            raise error
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            group.abort(f"rank {other} (pid {pid}) died at the start")
            raise PeerLost(f"group {group.name}: rank {other} (pid {pid}) died at the start") from None
        group._pidfds.append(pidfd)
        group._library.anabranch_watch(group._native, other, pidfd)


def _close(
    close: Callable[[int], None],
    free: Callable[[int], None],
    native: int,
    pidfds: list[int],
    transfers: dict[int, tuple[torch.Tensor, ...]],
    arena: Arena,
) -> None:
    close(native)
    for transfer in transfers:
        free(transfer)
    transfers.clear()
    for pidfd in pidfds:
        os.close(pidfd)
    pidfds.clear()
    arena.close()
