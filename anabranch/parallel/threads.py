"""Ranks as threads of one process: the group and the exchange that tests run on.

    results = run_ranks(3, lambda group: group.all_reduce(torch.ones(2)))

All ranks share one `_Hub`. A collective is one round of the hub: each rank lays down its part, and when all
have, each takes all parts. A transfer is a mailbox for each pair of ranks.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from anabranch.errors import DeadlineExceeded, PeerLost, TransportError
from anabranch.parallel.exchange import check_post, check_sizes
from anabranch.system.clock import wait_for

T = TypeVar("T")
COLLECTIVE_TIMEOUT_S = 30.0


class _Hub:
    """What the ranks of one group share. All fields are guarded by `changed`."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.failure: str | None = None
        self.children: list[_Hub] = []
        self._rounds: dict[int, dict[int, tuple[str, object]]] = defaultdict(dict)
        self._num_left: dict[int, int] = {}
        self._mail: dict[tuple[int, int, int], bytes] = {}
        self._subgroups: dict[tuple[int, int], _Hub] = {}

    def meet(self, what: str, round_: int, rank: int, part: T) -> list[T]:
        """Lay down `part` and take every rank's, in rank order."""
        with self.changed:
            self._check()
            parts = self._rounds[round_]
            parts[rank] = (what, part)
            self.changed.notify_all()
            self._wait(lambda: len(parts) == self.size, lambda: f"{what} of ranks {self._absent(parts)}")
            left = self._num_left[round_] = self._num_left.get(round_, self.size) - 1
            if left == 0:
                del self._rounds[round_], self._num_left[round_]
        names = {other: parts[other][0] for other in range(self.size)}
        if set(names.values()) != {what}:
            self.abort(f"ranks disagree on what they do: {names}")
            raise TransportError(f"ranks disagree on what they do: {names}")
        return [cast(T, parts[other][1]) for other in range(self.size)]

    def put(self, source: int, to: int, number: int, data: bytes) -> None:
        with self.changed:
            self._check()
            self._mail[source, to, number] = data
            self.changed.notify_all()

    def take(self, source: int, to: int, number: int) -> bytes:
        key = (source, to, number)
        with self.changed:
            self._check()
            self._wait(lambda: key in self._mail, lambda: f"a transfer from rank {source} to rank {to}")
            return self._mail.pop(key)

    def subgroup(self, round_: int, color: int, size: int) -> _Hub:
        with self.changed:
            hub = self._subgroups.get((round_, color))
            if hub is None:
                hub = self._subgroups[round_, color] = _Hub(size, self.timeout_s)
                self.children.append(hub)
            return hub

    def abort(self, reason: str) -> None:
        with self.changed:
            self.failure = self.failure or reason
            children = list(self.children)
            self.changed.notify_all()
        for child in children:
            child.abort(reason)

    def _absent(self, parts: dict[int, tuple[str, object]]) -> str:
        return ", ".join(str(rank) for rank in range(self.size) if rank not in parts)

    def _check(self) -> None:
        if self.failure is not None:
            raise PeerLost(self.failure)

    def _wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        done = wait_for(self.changed, lambda: ready() or self.failure is not None, self.timeout_s)
        if not done:
            self.failure = f"a rank gave up waiting for {what()}"
            self.changed.notify_all()
            raise DeadlineExceeded(f"{what()} did not come within collective_timeout_s = {self.timeout_s} s")
        if not ready():
            self._check()


class ThreadGroup:
    """One rank's view of a group whose ranks are threads; a `Group` and an `Exchange`.

    Sums go in rank order in float32, so all ranks get the same bits.
    """

    backend = "threads"

    def __init__(self, hub: _Hub, rank: int, name: str = "world") -> None:
        self.name = name
        self.rank = rank
        self.size = hub.size
        self.collective_timeout_s = hub.timeout_s
        self._hub = hub
        self._round = 0
        self._num_sent: dict[int, int] = defaultdict(int)
        self._num_received: dict[int, int] = defaultdict(int)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in x's memory."""
        return x.copy_(self._sum(self._meet("all_reduce", x.clone())))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `x`, joined along `dim` in rank order."""
        return torch.cat(self._meet("all_gather", x.clone()), dim)

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self._meet("barrier", None)

    def split(self, color: int) -> ThreadGroup:
        """The group of the ranks that give the same `color`, in rank order; every rank calls it."""
        colors = self._meet("split", color)
        members = [rank for rank, other in enumerate(colors) if other == color]
        hub = self._hub.subgroup(self._round, color, len(members))
        return ThreadGroup(hub, members.index(self.rank), f"{self.name}/{color}")

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> ThreadHandle:
        """See `Exchange.post`."""
        check_post(self, send, to, receive, source)
        if send:
            self._num_sent[to] += 1
            data = b"".join(_bytes_of(tensor).numpy().tobytes() for tensor in send)
            self._hub.put(self.rank, to, self._num_sent[to], data)
        if receive:
            self._num_received[source] += 1
        return ThreadHandle(self._hub, self.rank, tuple(receive), source, self._num_received[source])

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised contiguous tensor like `x`."""
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def abort(self, reason: str) -> None:
        """Make every wait of every rank of this group, and of its sub-groups, raise PeerLost."""
        self._hub.abort(reason)

    def close(self) -> None:
        """Nothing to release; here for the interface."""

    def _meet(self, what: str, part: T) -> list[T]:
        self._round += 1
        return self._hub.meet(what, self._round, self.rank, part)

    @staticmethod
    def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
        narrow = parts[0].dtype in (torch.bfloat16, torch.float16)
        total = parts[0].float() if narrow else parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(parts[0].dtype)


class ThreadHandle:
    """A posted transfer between threads: sent at once, taken at `wait`."""

    def __init__(self, hub: _Hub, rank: int, receive: tuple[torch.Tensor, ...], source: int, number: int) -> None:
        self._hub = hub
        self._rank = rank
        self._number = number
        self._receive = receive
        self._source = source

    def wait(self) -> None:
        """See `Handle.wait`."""
        receive, self._receive = self._receive, ()
        if not receive:
            return
        data = self._hub.take(self._source, self._rank, self._number)
        check_sizes(len(data), sum(tensor.nbytes for tensor in receive), self._source, self._rank)
        start = 0
        for tensor in receive:
            if tensor.nbytes:
                view = memoryview(data)[start : start + tensor.nbytes]
                _bytes_of(tensor).copy_(torch.frombuffer(bytearray(view), dtype=torch.uint8))
            start += tensor.nbytes


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def thread_groups(size: int, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> list[ThreadGroup]:
    """One group of `size` ranks, as each of them sees it."""
    hub = _Hub(size, collective_timeout_s)
    return [ThreadGroup(hub, rank) for rank in range(size)]


def run_ranks(
    size: int,
    run: Callable[[ThreadGroup], T],
    *,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    deadline_s: float = 60.0,
) -> list[T]:
    """Run `run(group)` on `size` ranks, each in a thread of its own, and give their results in rank order.

    Raises:
        Exception: the first rank's failure; the other ranks' waits end with it.
        DeadlineExceeded: a rank was still running after `deadline_s`.
    """
    hub = _Hub(size, collective_timeout_s)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = run(ThreadGroup(hub, rank))
        except BaseException as error:
            failures.append(error)
            hub.abort(f"rank {rank} failed: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if failures:
        raise failures[0]
    late = [thread.name for thread in threads if thread.is_alive()]
    if late:
        hub.abort(f"{', '.join(late)} ran out of time")
        raise DeadlineExceeded(f"{', '.join(late)} still run after deadline_s = {deadline_s} s")
    return [results[rank] for rank in range(size)]
