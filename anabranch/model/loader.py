"""Fills a rank's final tensors straight from a checkpoint: no second copy of the model, every shape checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

import torch

from anabranch.errors import CheckpointError
from anabranch.model.config import ModelConfig
from anabranch.model.weights import Slices, WeightSource

# Called with (parts done, parts in all) as loading goes on; the caller decides what becomes of it.
Progress = Callable[[int, int], None]

# What old checkpoints carry although it follows from the configuration.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

Stack = Literal["attention", "ffn"]
# The gate is named among the experts, and belongs to attention: rows must know where to go before they leave.
_FFN_NAME = re.compile(r"model\.layers\.\d+\.(mlp|block_sparse_moe)\.(?!gate\.)")


def stack_of(name: str) -> Stack:
    """Which of a model's two stacks a tensor belongs to; what no layer's FFN is called like is attention's."""
    return "ffn" if _FFN_NAME.match(name) else "attention"


def check_finite(values: torch.Tensor, name: str, source: WeightSource) -> None:
    """Raise CheckpointError if a tensor's values, as they will be computed with, are not all finite."""
    if not values.numel():
        return
    # A NaN is both the least and the greatest; this costs about a tenth of loading.
    least, greatest = (float(bound) for bound in values.aminmax())
    if not (math.isfinite(least) and math.isfinite(greatest)):
        dtype = str(values.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source.where(name)}: {name} holds values that are not finite in {dtype} "
            f"(from {least:g} to {greatest:g}); fetch it again, or choose a wider dtype"
        )


class WeightLoader:
    """Reads named tensors of one checkpoint into preallocated memory.

    Args:
        dtype: of the tensors filled; the file's own is converted on the way.
        num_parts: how often `part_done` will be called.
        progress: told of each part.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        num_parts: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self._used: set[str] = set()
        self._names = frozenset(source.names())
        self._num_parts = num_parts
        self._num_done = 0
        self._progress = progress

    def part_done(self) -> None:
        """A layer's half, or what comes before the first or after the last, is loaded."""
        self._num_done += 1
        if self._progress is not None:
            self._progress(self._num_done, self._num_parts)

    def has(self, name: str) -> bool:
        return name in self._names

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised memory on the model's device, to be filled."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def fill(self, out: torch.Tensor, name: str, shape: tuple[int, ...], slices: Slices = ()) -> None:
        """Copy the part `slices` of a tensor, whose whole shape must be `shape`, into `out`.

        On the meta device only the file's header is read: name, shape and dtype are checked.

        Raises:
            CheckpointError: the tensor is missing, of another shape or dtype, unreadable, or holds values that are
                not finite.
        """
        if name not in self._names:
            raise CheckpointError(f"{self.source.where(name)}: tensor {name} {list(shape)} is missing")
        found = self.source.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self.source.where(name)}: {name} has shape {list(found)}, the configuration expects {list(shape)}"
            )
        self._used.add(name)
        if out.is_meta:
            self.source.read(name, (slice(0, 0),))
        elif out.numel():
            out.copy_(self.source.read(name, slices))
            check_finite(out, name, self.source)

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor that every rank holds whole."""
        out = self.empty(*shape)
        self.fill(out, name, shape)
        return out

    def finish(self, *stacks: Stack) -> None:
        """Raise CheckpointError if the checkpoint holds tensors that the configuration has no place for.

        Args:
            stacks: those that were loaded; tensors of the other are left to other processes on purpose.
        """
        ignored = {"lm_head.weight"} if self.config.tie_embeddings else set()
        extra = sorted(
            name
            for name in self._names - self._used - ignored
            if stack_of(name) in stacks and not name.endswith(DERIVED_SUFFIXES)
        )
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise CheckpointError(
                f"{self.source.where(extra[0])}: {extra[0]}{more}: the configuration of "
                f"{self.config.architecture} with {self.config.num_layers} layers has no place for it"
            )
