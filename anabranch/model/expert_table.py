"""Experts by layer and number, that come and go while the process serves. A dense layer has one expert, 0.

Shape suffixes: T rows, A assignments (a row and one of its experts), C hidden, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch

from anabranch.errors import CheckpointError
from anabranch.kernels.base import Products
from anabranch.model.config import ModelConfig
from anabranch.model.digest import weights_digest
from anabranch.model.expert_reader import ExpertReader
from anabranch.model.ffn_half import DenseFfn, layer_ffn
from anabranch.model.loader import WeightLoader
from anabranch.model.shared_expert import shared_ffn
from anabranch.model.shared_layers import ffn_layers
from anabranch.model.size import num_experts
from anabranch.model.sources import ModelSource
from anabranch.parallel.group import Group
from anabranch.protocol.ffn import Holding


class _Expert(NamedTuple):
    gate_up_FC: torch.Tensor
    down_CF: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.gate_up_FC.nbytes + self.down_CF.nbytes


class ExpertTable:
    """This rank's slices of dense FFNs and single experts, and of shared ones where attention does not have them.

    Loading, dropping and computing may go on at the same time, each on one thread: what is dropped meanwhile is still
    computed with. Who drops what another has just been told to load sees to it himself.

    Args:
        source: where experts are read from, now and later.
        config: with the weights' digest.
        products: what is computed with.
        group: ranks that each expert's features are sliced over.
        shared: whether the expert that all rows of a layer choose, if it has one, is its last one here.

    Attributes:
        layers: see `ffn_layers`.
    """

    def __init__(
        self,
        source: ModelSource,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        products: Products,
        group: Group,
        shared: bool = False,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._source = source
        self._products = products
        self._group = group
        self._shared = shared
        self.layers = ffn_layers(config, str(dtype).removeprefix("torch."), shared=shared)
        self._dense: dict[int, DenseFfn] = {}
        self._experts: list[dict[int, _Expert]] = [{} for _ in range(config.num_layers)]

    @contextmanager
    def reading(self) -> Iterator[WeightLoader]:
        """The checkpoint, for `load`; closed at the end, so that none of its pages stay mapped.

        Raises:
            CheckpointError: it is no longer what it was.
        """
        with self._source.weights() as weights:
            if weights_digest(weights) != self.config.weights_digest:
                raise CheckpointError(
                    f"{self._source.path}: the weights have changed since this process started; start it again"
                )
            yield WeightLoader(self.config, weights, self.dtype, self.device)

    def load(self, loader: WeightLoader, layer: int, experts: Iterable[int]) -> None:
        """Read experts of a layer; those that are here already are left alone.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or broken.
        """
        missing = [expert for expert in experts if not self.holds(layer, (expert,))]
        if not missing:
            return
        if not self.config.is_sparse(layer):
            self._dense[layer] = layer_ffn(loader, self._products, self._group, layer)
            return
        reader = ExpertReader(loader, self._group, layer)
        hidden = self.config.hidden_size
        for expert in missing:
            if expert == num_experts(self.config, layer):
                ffn = shared_ffn(loader, self._products, self._group, layer, reduce=False)
                read = _Expert(ffn.gate_up.weight_FC, ffn.down.weight_FC)
            else:
                read = _Expert(loader.empty(2 * reader.num_features, hidden), loader.empty(hidden, reader.num_features))
                reader.fill(expert, *read)
            self._experts[layer][expert] = read

    def drop(self, layer: int, experts: Iterable[int]) -> None:
        """Forget experts; those that are not here are left alone."""
        for expert in experts:
            if not self.config.is_sparse(layer):
                self._dense.pop(layer, None)
            else:
                self._experts[layer].pop(expert, None)

    def num_experts(self, layer: int) -> int:
        """Experts of a layer, here or not, numbered from 0."""
        return num_experts(self.config, layer, shared=self._shared)

    def holds(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether all of these are here."""
        if not self.config.is_sparse(layer):
            return layer in self._dense
        held = self._experts[layer]
        return all(expert in held for expert in experts)

    def holding(self) -> Holding:
        """For each layer the experts that are here, ascending."""
        return tuple(
            tuple(sorted(self._experts[layer])) if self.config.is_sparse(layer) else (0,) * (layer in self._dense)
            for layer in range(self.config.num_layers)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's slices."""
        experts = sum(expert.num_bytes for layer in self._experts for expert in tuple(layer.values()))
        return experts + sum(ffn.num_bytes for ffn in tuple(self._dense.values()))

    def compute_rows(self, layer: int, rows_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, C]` of a dense layer. Raises KeyError where it is not here."""
        return self._dense[layer].compute(rows_TC)

    def compute_slots(
        self, layer: int, rows_TC: torch.Tensor, rows_A: torch.Tensor, experts_A: torch.Tensor
    ) -> torch.Tensor:
        """`[A, C]`: what each assignment's expert makes of its row, unweighted, in the order of the assignments.

        Args:
            rows_A: int32 or int64, below T.
            experts_A: int32 or int64.

        Raises:
            KeyError: an expert is not here.
        """
        held = self._experts[layer]
        order_A = experts_A.argsort(stable=True)
        given_AC = rows_TC.index_select(0, rows_A.index_select(0, order_A))
        made_AC = torch.empty_like(given_AC)
        start = 0
        for expert, count in _runs(experts_A.index_select(0, order_A).tolist()):
            stop = start + count
            made_AC[start:stop] = self._apply(held[expert], given_AC[start:stop])
            start = stop
        answers_AC = torch.empty_like(made_AC).index_copy_(0, order_A, made_AC)
        return answers_AC if self._group.size == 1 else self._products.all_reduce(answers_AC, self._group)

    def _apply(self, expert: _Expert, rows_TC: torch.Tensor) -> torch.Tensor:
        hidden_TF = self._products.linear_silu_mul(rows_TC, expert.gate_up_FC, None)
        return self._products.linear(hidden_TF, expert.down_CF, None)


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`(value, how often it comes in a row)`, in order."""
    for value, group in groupby(values):
        yield value, sum(1 for _ in group)
