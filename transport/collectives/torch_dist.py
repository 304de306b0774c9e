"""Ranks over torch.distributed: NCCL between GPUs, Gloo between CPU ranks that cannot share memory.

The process groups are objects of their own, not torch's global one, so that a worker that lost a rank can make
new ones. They meet in a file in the rendezvous folder and listen on loopback alone. Tensors only: bytes travel
as uint8 tensors over Gloo, which an NCCL group has beside it; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from anabranch.errors import AnabranchError, DeadlineExceeded, PeerLost, TransportError, TransportUnavailable
from anabranch.parallel.exchange import check_post
from transport.collectives.base import COLLECTIVE_TIMEOUT_S
from transport.collectives.rendezvous import check_folder

_LOOPBACK = "127.0.0.1"


class _ProcessGroup(Protocol):
    """What is used of torch's process groups, which its stubs leave out."""

    def allreduce(self, tensors: list[torch.Tensor]) -> dist.Work: ...
    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor) -> dist.Work: ...
    def barrier(self) -> dist.Work: ...
    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> dist.Work: ...
    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> dist.Work: ...
    def _start_coalescing(self, device: torch.device) -> None: ...
    def _end_coalescing(self, device: torch.device) -> dist.Work: ...
    def abort(self) -> None: ...


class TorchGroup:
    """One rank of a group over torch.distributed; a `CollectiveGroup`.

    Args:
        backend: gloo (CPU tensors) or nccl (tensors on this rank's GPU).
        store: where the ranks meet; theirs alone.
    """

    def __init__(
        self, *, name: str, backend: str, rank: int, size: int, store: Store, collective_timeout_s: float
    ) -> None:
        self.name = name
        self.backend = backend
        self.rank = rank
        self.size = size
        self.collective_timeout_s = collective_timeout_s
        self._store = store
        self._failure: AnabranchError | None = None
        self._num_splits = 0
        self._num_sent = [0] * size
        self._num_received = [0] * size
        with self._mapped("the start"):
            self._control = _make_gloo(PrefixStore(f"{name}/gloo", store), rank, size, collective_timeout_s)
            self._data = self._control
            if backend == "nccl":
                self._data = _make_nccl(PrefixStore(f"{name}/nccl", store), rank, size, collective_timeout_s)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in x's memory where x is contiguous."""
        x = x.contiguous()
        with self._mapped("all_reduce"):
            self._data.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `x`, of one shape, joined along `dim` in rank order."""
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        with self._mapped("all_gather"):
            self._data._allgather_base(out.view(-1), x.view(-1)).wait()
        return out.flatten(0, 1) if dim % x.dim() == 0 else torch.cat(out.unbind(0), dim)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        with self._mapped("barrier"):
            self._control.barrier().wait()

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> TorchHandle:
        """See `Exchange.post`."""
        check_post(self, send, to, receive, source)
        target = _flat(receive, copy=False) if receive else None
        flat = _flat(send, copy=True) if send else None
        works: list[dist.Work] = []
        # NCCL must start both at once, or each end might wait for the other's.
        device = torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else None
        with self._mapped("a transfer"):
            if device is not None:
                self._data._start_coalescing(device)
            if target is not None:
                self._num_received[source] += 1
                works.append(self._data.recv([target], source, self._num_received[source]))
            if flat is not None:
                self._num_sent[to] += 1
                works.append(self._data.send([flat], to, self._num_sent[to]))
            if device is not None:
                works = [self._data._end_coalescing(device)]
        return TorchHandle(works, lambda: self._mapped("a transfer"), (flat, target), tuple(receive))

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised contiguous tensor like `x`."""
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def split(self, color: int) -> TorchGroup:
        """The group of the ranks that give the same `color`, in rank order; every rank calls it."""
        colors = torch.empty(self.size, dtype=torch.int64)
        with self._mapped("split"):
            self._control._allgather_base(colors, torch.tensor([color])).wait()
        members = [rank for rank, other in enumerate(colors.tolist()) if other == color]
        self._num_splits += 1
        return TorchGroup(
            name=f"{self.name}/{self._num_splits}.{color}",  # also where its ranks meet in the store
            backend=self.backend,
            rank=members.index(self.rank),
            size=len(members),
            store=self._store,
            collective_timeout_s=self.collective_timeout_s,
        )

    def abort(self, reason: str) -> None:
        """Close the connections: every rank's waits end with PeerLost, this rank's with `reason`."""
        if self._failure is None:
            self._failure = PeerLost(f"group {self.name}: {reason}")
            self._drop()

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self.abort("this rank has closed it")

    def _drop(self) -> None:
        for group in {id(group): group for group in (self._data, self._control)}.values():
            with contextlib.suppress(RuntimeError):  # a connection that broke before
                group.abort()

    @contextlib.contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        """Turn torch's errors into ours; the group ends with the first."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except RuntimeError as error:
            if self._failure is None:
                text = " ".join(str(error).split())[:300]
                kind = _kind_of(text)
                limit = f" (collective_timeout_s = {self.collective_timeout_s} s)" if kind is DeadlineExceeded else ""
                self._failure = kind(f"group {self.name}: rank {self.rank} was in {what}{limit}: {text}")
                self._drop()
            raise self._failure from None


class TorchHandle:
    """A posted transfer over torch.distributed."""

    def __init__(
        self,
        works: list[dist.Work],
        mapped: Callable[[], contextlib.AbstractContextManager[None]],
        flat: tuple[torch.Tensor | None, torch.Tensor | None],
        receive: tuple[torch.Tensor, ...],
    ) -> None:
        self._works = works
        self._mapped = mapped
        self._flat = flat  # kept while bytes move
        self._receive = receive

    def wait(self) -> None:
        """See `Handle.wait`."""
        with self._mapped():
            while self._works:
                self._works[-1].wait()
                self._works.pop()
        target = self._flat[1]
        if target is not None and len(self._receive) > 1:
            start = 0
            for tensor in self._receive:
                tensor.view(-1).view(torch.uint8).copy_(target[start : start + tensor.nbytes])
                start += tensor.nbytes
        self._flat, self._receive = (None, None), ()


def join(
    *,
    backend: str,
    rank: int,
    size: int,
    rendezvous: Path,
    name: str = "world",
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    start_timeout_s: float = 60.0,
) -> TorchGroup:
    """Meet the other ranks in a file in `rendezvous` and make a group with them.

    Raises:
        TransportUnavailable: torch was built without this backend.
        ConfigError: an unfit folder.
        DeadlineExceeded: a rank did not come within `start_timeout_s`.
    """
    check_folder(rendezvous)
    has = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}[backend]
    if not has():
        raise TransportUnavailable(f"torch {torch.__version__} was built without {backend}")
    store = FileStore(str(rendezvous / f"{name}.store"), size)
    store.set_timeout(timedelta(seconds=start_timeout_s))
    return TorchGroup(
        name=name, backend=backend, rank=rank, size=size, store=store, collective_timeout_s=collective_timeout_s
    )


def _make_gloo(store: Store, rank: int, size: int, timeout_s: float) -> _ProcessGroup:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    return cast(_ProcessGroup, dist.ProcessGroupGloo(store, rank, size, options))


def _make_nccl(store: Store, rank: int, size: int, timeout_s: float) -> _ProcessGroup:
    # Ranks of one host meet on loopback; an operator who spans hosts names the interface.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return cast(_ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))


def _flat(tensors: Sequence[torch.Tensor], *, copy: bool) -> torch.Tensor:
    """All bytes as one tensor: the only tensor's own memory, or a new one (filled where `copy`)."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1).view(torch.uint8)
    if copy:
        return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    return tensors[0].new_empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)


def _kind_of(text: str) -> type[AnabranchError]:
    if re.search(r"timed? ?out", text, re.IGNORECASE):
        return DeadlineExceeded
    if re.search(r"closed|reset|refused|abort|broken pipe|peer", text, re.IGNORECASE):
        return PeerLost
    return TransportError
