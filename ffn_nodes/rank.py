"""`python -m ffn_nodes.rank`: a rank of an FFN worker other than the first, which lives in the worker's own process.

It holds its slice of every expert that the worker holds, loads on a thread of its own, and takes part in each product.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

import msgspec
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.model.config import ModelConfig
from anabranch.model.expert_table import ExpertTable
from anabranch.parallel.context import RankContext
from anabranch.protocol.wire_error import WireError
from ffn_nodes.commands import AnyCommand, Compute, Drop, Load, Loaded
from ffn_nodes.experts import load_experts
from ffn_nodes.table import make_table
from ffn_nodes.throttle import Throttle, share_interpreter
from runtime.rank_process import run_rank

# Where a core is contended, who computes gets ten times as much of it.
NICE = 10
STOP_TIMEOUT_S = 5.0


class FfnRank:
    """See `Follower`.

    Args:
        emit: takes what it has to say; called from any thread.
    """

    def __init__(self, table: ExpertTable, emit: Callable[[Loaded], None]) -> None:
        self._table = table
        self._emit = emit
        self._num_products = 0
        self._throttle = Throttle(lambda: self._num_products)
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._load, name="loading", daemon=True)
        self._thread.start()

    def handle(self, command: AnyCommand) -> None:
        """Obey a command; see its docstring."""
        match command:
            case Load():
                self._loads.put(command)
            case Drop(experts=experts):
                for layer, expert in experts:
                    self._table.drop(layer, (expert,))
            case Compute():
                self._compute(command)
                self._num_products += 1

    def close(self) -> None:
        self._loads.put(None)
        self._thread.join(STOP_TIMEOUT_S)

    @torch.inference_mode()
    def _compute(self, command: Compute) -> None:
        table, hidden = self._table, self._table.config.hidden_size
        rows_TC = tensor_of(command.rows, table.dtype).view(-1, hidden).to(table.device)
        if not table.config.is_sparse(command.layer):
            table.compute_rows(command.layer, rows_TC)
            return
        rows_A, experts_A = (
            tensor_of(data, torch.int32).to(table.device) for data in (command.rows_A, command.experts_A)
        )
        table.compute_slots(command.layer, rows_TC, rows_A, experts_A)

    def _load(self) -> None:
        be_nice()
        torch.set_num_threads(1)
        while (load := self._loads.get()) is not None:
            error: WireError | None = None
            try:
                self._throttle.begin()
                if not load_experts(self._table, load.experts, self._interrupted):
                    continue
            except Exception as problem:
                error = WireError.of(problem)
            self._emit(Loaded(number=load.number, error=error))

    def _interrupted(self) -> bool:
        self._throttle.rest()
        return not self._loads.empty()


class FfnRoom(msgspec.Struct, frozen=True, kw_only=True):
    """See `FollowerRoom`."""

    module: str
    commands: msgspec.msgpack.Decoder[AnyCommand]
    events: msgspec.msgpack.Decoder[tuple[int, Loaded]]

    def follow(
        self, config: WorkerConfig, context: RankContext, model: ModelConfig, emit: Callable[[Loaded], None]
    ) -> FfnRank:
        """Make a rank that holds nothing yet."""
        return FfnRank(make_table(config, model, context.tp), emit)


def be_nice() -> None:
    """Give other threads of this process the core first; for a thread that only loads."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as they lie in memory."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The reverse, flat."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


ROOM = FfnRoom(
    module="ffn_nodes.rank",
    commands=msgspec.msgpack.Decoder(AnyCommand),
    events=msgspec.msgpack.Decoder(tuple[int, Loaded]),
)

if __name__ == "__main__":
    share_interpreter()
    run_rank(ROOM)
