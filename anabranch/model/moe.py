"""Mixture of experts: the gate, which belongs to the attention half, and the experts, which do not.

Shape suffixes: T tokens, C hidden, F features, E experts, S chosen experts of a token.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from anabranch.kernels.base import Kernels
from anabranch.model.expert_names import expert_names
from anabranch.model.expert_reader import ExpertReader
from anabranch.model.ffn_half import FfnInput
from anabranch.model.loader import WeightLoader
from anabranch.model.shared_expert import SharedExpert, SharedGate, has_shared_expert
from anabranch.parallel.group import Group


class Gate:
    """Chooses each token's experts: softmax over all, then the likeliest, as transformers does.

    Args:
        shared: choose the shared expert too, if the layer has one, as the last of each token and by a gate of its own.
    """

    def __init__(self, loader: WeightLoader, kernels: Kernels, layer: int, *, shared: bool = False) -> None:
        moe = loader.config.moe
        assert moe is not None
        names = expert_names(loader, layer)
        self.weight_EC = loader.whole(names.gate, moe.num_experts, loader.config.hidden_size)
        self._linear = kernels.linear
        self._top_k = moe.top_k
        self._normalise = moe.norm_topk_prob
        self._num_experts = moe.num_experts
        self.shared = SharedGate(loader, kernels, layer) if shared and has_shared_expert(loader, layer) else None

    def forward(self, normed_TC: torch.Tensor) -> FfnInput:
        """Rows `[T, C]` with their choices."""
        logits_TE = self._linear(normed_TC, self.weight_EC, None)
        weights_TS, experts_TS = functional.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(self._top_k, dim=-1)
        if self._normalise:
            weights_TS = weights_TS / weights_TS.sum(dim=-1, keepdim=True)
        if self.shared is None:
            return FfnInput(normed_TC, weights_TS, experts_TS)
        weights_TS = torch.cat((weights_TS, self.shared.forward(normed_TC).float()), dim=-1)
        experts_TS = functional.pad(experts_TS, (0, 1), value=self._num_experts)
        return FfnInput(normed_TC, weights_TS, experts_TS, shared=True)


class MoeFfn:
    """Experts of a layer, each sliced by rank along its features, and the shared expert if there is one."""

    def __init__(self, loader: WeightLoader, kernels: Kernels, group: Group, layer: int) -> None:
        moe = loader.config.moe
        assert moe is not None
        reader = ExpertReader(loader, group, layer)
        self.gate_up_EFC = loader.empty(moe.num_experts, 2 * reader.num_features, loader.config.hidden_size)
        self.down_ECF = loader.empty(moe.num_experts, loader.config.hidden_size, reader.num_features)
        for expert in range(moe.num_experts):
            reader.fill(expert, self.gate_up_EFC[expert], self.down_ECF[expert])
        self.shared: SharedExpert | None = None
        if has_shared_expert(loader, layer):
            self.shared = SharedExpert(loader, kernels, group, layer, reduce=False)
        self._kernels = kernels
        self._group = group if group.size > 1 else None

    def forward(self, rows: FfnInput) -> torch.Tensor:
        """See `FfnHalf.forward`; one all-reduce for the chosen experts and the shared one together."""
        normed_TC, weights_TS, experts_TS, _ = rows
        assert weights_TS is not None
        assert experts_TS is not None
        out_TC = self._kernels.experts(normed_TC, weights_TS, experts_TS, self.gate_up_EFC, self.down_ECF)
        if self.shared is not None:
            out_TC = out_TC + self.shared.forward(normed_TC)
        return out_TC if self._group is None else self._kernels.all_reduce(out_TC, self._group)
